"""What ``argosy serve`` promises under load and faults, proved on a server that this program starts itself.

    python -m benchmarks.server_faults load|leaks|overload|disconnects|drain|kills [--number N]

Each scenario prints a card and one line of JSON; the exit code is 1 if a promise was broken. Times depend on what else
the machine does: the load average is printed with them.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable, Coroutine

from benchmarks.server_faults.disconnects import run_disconnects
from benchmarks.server_faults.drain import run_drain
from benchmarks.server_faults.kills import run_kills
from benchmarks.server_faults.load import Outcome, run_leaks, run_load
from benchmarks.server_faults.overload import run_overload
from benchmarks.server_faults.server import describe_machine, print_outcome

SCENARIOS: dict[str, Callable[..., Coroutine[object, object, Outcome]]] = {
    "load": run_load,
    "leaks": run_leaks,
    "overload": run_overload,
    "disconnects": run_disconnects,
    "drain": run_drain,
    "kills": run_kills,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=sorted(SCENARIOS))
    parser.add_argument("--number", type=int, help="requests or clients, instead of the number that was promised")
    parser.add_argument("--only", help="kills: only cases whose name contains this")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left
    are_kept = True
    for name in arguments.scenarios:
        options: list[object] = [] if arguments.number is None else [arguments.number]
        if name == "kills" and arguments.only:
            options = [arguments.only]
        before = describe_machine()
        started_s = time.monotonic()
        outcome = asyncio.run(SCENARIOS[name](*options))
        after = describe_machine()["load_average"]
        print_outcome(outcome | before | {"load average after": after, "took": round(time.monotonic() - started_s, 1)})
        are_kept = are_kept and bool(outcome["passed"])
    sys.exit(0 if are_kept else 1)


if __name__ == "__main__":
    main()
