"""Sends generated nonsense to a running server and says what became of both.

    argosy serve --port 8000 --dp 2 --max-model-len 256 2> serve.log &
    python -m benchmarks.bad_inputs --url http://127.0.0.1:8000 --pid $! --log serve.log --number 20000

It fails if an answer is a 5xx other than 503 and 504, a refusal is no error object, a process died, or a traceback was
logged. Memory is that of all the server's processes together, before, at half, and at the end.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.helpers.body_mutations import mutated_requests
from tests.helpers.listeners import family_of

ALLOWED_ERRORS = (503, 504)
WARM_UP = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--log", type=Path, required=True, help="what the server writes to stderr")
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key", default="none")
    arguments = parser.parse_args()
    report = asyncio.run(run(arguments))
    report["tracebacks"] = arguments.log.read_text(errors="replace").count("Traceback")
    report["is_good"] = not (report["failures"] or report["tracebacks"] or report["processes_lost"])
    print(json.dumps(report))
    sys.exit(not report["is_good"])


async def run(arguments: argparse.Namespace) -> dict[str, object]:
    requests = mutated_requests(random.Random(arguments.seed), arguments.number)
    processes = set(family_of(arguments.pid))
    statuses: Counter[int] = Counter()
    failures: list[str] = []
    memory_mib: list[float] = []
    started_s = time.monotonic()
    headers = {"authorization": f"Bearer {arguments.api_key}"}
    async with httpx.AsyncClient(base_url=arguments.url, timeout=120, headers=headers) as client:

        async def work() -> None:
            for path, body in requests:
                answer = await client.post(path, content=body, headers={"content-type": "application/json"})
                statuses[answer.status_code] += 1
                if (fault := find_fault(answer)) is not None:
                    failures.append(f"{path} {body[:300]!r}: {fault}")
                if statuses.total() in (WARM_UP, arguments.number // 2, arguments.number):
                    memory_mib.append(read_memory_mib(arguments.pid))

        await asyncio.gather(*(work() for _ in range(arguments.concurrency)))
        good = await client.post("/v1/completions", json={"prompt": "1 + 1", "max_tokens": 4})
    return {
        "number": arguments.number,
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started_s, 1),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "failures": failures[:20],
        "memory_mib": memory_mib,
        "processes_lost": sorted(processes - set(family_of(arguments.pid))),
        "good_request_after": good.status_code,
    }


def find_fault(answer: httpx.Response) -> str | None:
    """None: as it should be."""
    if answer.status_code == 200:
        return None
    if answer.status_code >= 500 and answer.status_code not in ALLOWED_ERRORS:
        return f"{answer.status_code} {answer.text[:300]}"
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error object: {answer.text[:300]}"
    return None if set(error) == {"message", "type", "param", "code"} else f"a strange error object: {error}"


def read_memory_mib(pid: int) -> float:
    """Resident, of a process and all that descend from it; what they share counts once for each."""
    pages = 0
    for member in family_of(pid):
        pages += int(Path(f"/proc/{member}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * 4096 / 2**20, 1)


if __name__ == "__main__":
    main()
