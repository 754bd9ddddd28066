"""What the server adds to an engine: processor time a token, time to the first token, and the time until it is ready.

The first two are measured on ``argosy serve`` as it is, over an engine that computes nothing
(``played_engine.py``) and clients on raw sockets in this process; processor time is that of the API process, all
threads, which other load on the machine does not stretch as it does wall time. Ready is the built-in model's.
Invariant: numbers are printed only after every stream of every run said exactly what its engine did.

    python -m benchmarks.server_cost [--streams 32] [--tokens 120] [--runs 3]
"""

import argparse
import asyncio
import json
import os
import platform
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import argosy
from argosy.cli.code_version import read_commit, read_version
from argosy.config import EngineConfig
from argosy.engine.tokenizer import Tokenizer
from argosy.server.run import serve
from argosy.server.settings import ServerConfig
from benchmarks.played_engine import STEP_S, answer_of, start_played_engine

MODEL = "argosy-tiny"
ASSETS = Path(argosy.__file__).parent / "assets" / MODEL
START_S = 120.0
NUM_FIRST_TOKENS = 40  # requests whose first token is timed
MARGIN_TOKENS = 20  # at both ends of a run: processor time is that of streams under way, not of their begin and end
MAX_TOKENS_AN_EVENT = 1.1
GOALS = {"cpu_us_per_token": 60.0, "first_token_ms": 5.0, "ready_s": 8.0}
SERVER_FLAG = "--as-server"


@dataclass(slots=True)
class Stream:
    """One request and what came of it."""

    num_tokens: int
    path: str
    started_s: float = 0.0
    first_token_s: float = 0.0
    num_told: int = 0
    num_events: int = 0  # with text; fewer than tokens where the server came too late for a step of its own
    text: str = ""
    usage: dict[str, int] = field(default_factory=dict)

    def body(self) -> bytes:
        body: dict[str, object] = {"max_tokens": self.num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.path.endswith("chat/completions"):
            body["messages"] = [{"role": "user", "content": "How much is six times seven?"}]
        else:
            body["prompt"] = "How much is six times seven?"
        return json.dumps(body).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="at once")
    parser.add_argument("--tokens", type=int, default=120, help="tokens a stream")
    parser.add_argument("--runs", type=int, default=3, help="of each measurement; their spread is reported")
    parser.add_argument("--no-ready", action="store_true", help="leave out the start with the built-in model")
    parser.add_argument("--profile", metavar="FILE", help="write what cProfile sees in the API process")
    parser.add_argument(SERVER_FLAG, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_server:
        run_server()
        return
    results: dict[str, list[float]] = {}
    with started_server(arguments.profile) as (url, pid):
        for path in ("/v1/chat/completions", "/v1/completions"):
            name = path.rpartition("v1/")[2]
            measure = measure_tokens(url, pid, path, arguments.streams, arguments.tokens)
            results[f"cpu_us_per_token, {name}"] = [measure() for _ in range(arguments.runs + 1)][1:]
        results["first_token_ms, a new connection each"] = measure_first_tokens(url)
    if not arguments.no_ready:
        results["ready_s, built-in model"] = [measure_ready() for _ in range(arguments.runs)]
    report(arguments, results)


def run_server() -> None:
    config = EngineConfig(model=MODEL, device="cpu")
    serve(config, ServerConfig(port=0), version=read_version(), say=_say, start_process=start_played_engine)


@contextmanager
def started_server(profile: str | None) -> Iterator[tuple[str, int]]:
    """Its address and pid."""
    profiler = ["-m", "cProfile", "-o", profile] if profile else []
    command = [sys.executable, *profiler, "-m", "benchmarks.server_cost", SERVER_FLAG]
    with started(command) as (url, process):
        yield url, process.pid


@contextmanager
def started(command: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    reader = threading.Thread(target=_read_log, args=(process.stderr, said := queue.SimpleQueue[str]()), daemon=True)
    reader.start()
    try:
        yield _wait_for_address(said, command), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=START_S)
        reader.join()


def _read_log(log: IO[str], said: "queue.SimpleQueue[str]") -> None:
    """To its end: a server whose log nobody reads stands still when the pipe is full."""
    for line in log:
        said.put(line)
    said.put("")


def _wait_for_address(said: "queue.SimpleQueue[str]", command: list[str]) -> str:
    deadline_s = time.monotonic() + START_S
    while line := said.get(timeout=max(0.0, deadline_s - time.monotonic())):
        if match := re.search(r"listening on http://(\S+)", line):
            return match.group(1)
    raise RuntimeError(f"{' '.join(command)} ended before it was ready")


def measure_tokens(url: str, pid: int, path: str, num_streams: int, num_tokens: int) -> Callable[[], float]:
    """A run's microseconds of processor time a token."""

    async def run() -> float:
        streams = [Stream(num_tokens, path) for _ in range(num_streams)]
        marks: list[tuple[float, int]] = []

        def watch() -> None:
            told = [each.num_told for each in streams]
            if not marks and min(told) >= MARGIN_TOKENS:
                marks.append((read_cpu_s(pid), sum(told)))
            if len(marks) == 1 and max(told) >= num_tokens - MARGIN_TOKENS:
                marks.append((read_cpu_s(pid), sum(told)))

        await asyncio.gather(*(read_stream(url, each, watch) for each in streams))
        for stream in streams:
            check(stream)
        (begin_s, begin), (end_s, end) = marks
        tokens_an_event = sum(each.num_told for each in streams) / sum(each.num_events for each in streams)
        if tokens_an_event > MAX_TOKENS_AN_EVENT:
            print(f"note: {tokens_an_event:.2f} tokens an event; busy machine, tokens seem cheaper than they are")
        return (end_s - begin_s) / (end - begin) * 1e6

    return lambda: asyncio.run(run())


def measure_first_tokens(url: str) -> list[float]:
    """Milliseconds, one request after another: the engine answers at once, so all of it is the server's."""

    async def run() -> list[float]:
        times = []
        for _ in range(NUM_FIRST_TOKENS):
            stream = Stream(2, "/v1/chat/completions")
            await read_stream(url, stream, lambda: None)
            check(stream)
            times.append((stream.first_token_s - stream.started_s) * 1e3)
            await asyncio.sleep(0.01)
        return times[5:]

    return asyncio.run(run())


def measure_ready() -> float:
    """Seconds from the command to the first answer of ``/ready`` that says so; the line before it ends the wait."""
    started_s = time.monotonic()
    with started([sys.executable, "-m", "argosy", "serve", "--port", "0"]) as (url, _):

        async def ask() -> bytes:
            reader, writer = await asyncio.open_connection(*url.rsplit(":", 1))
            writer.write(f"GET /ready HTTP/1.1\r\nHost: {url}\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            return answer

        answer = asyncio.run(ask())
        assert answer.startswith(b"HTTP/1.1 200"), answer
        return time.monotonic() - started_s


async def read_stream(url: str, stream: Stream, on_event: Callable[[], None]) -> None:
    body = stream.body()
    head = f"POST {stream.path} HTTP/1.1\r\nHost: {url}\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    stream.started_s = time.monotonic()
    reader, writer = await asyncio.open_connection(*url.rsplit(":", 1))
    writer.write(head.encode() + body)
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        for choice in event["choices"]:
            delta = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            if delta and not stream.first_token_s:
                stream.first_token_s = time.monotonic()
            stream.text += delta
            stream.num_events += bool(delta)
            stream.num_told += len(delta)  # the played tokens are a character each
        stream.usage = event.get("usage") or stream.usage
        on_event()
    writer.close()


def check(stream: Stream) -> None:
    """That it said what the engine did: the text, and how many tokens."""
    tokenizer = Tokenizer.from_directory(ASSETS)
    expected = answer_of(stream.usage["prompt_tokens"], stream.num_tokens)
    assert stream.usage["completion_tokens"] == stream.num_tokens, stream.usage
    assert stream.text == tokenizer.decode(expected), f"{stream.text!r} instead of {tokenizer.decode(expected)!r}"


def read_cpu_s(pid: int) -> float:
    """Processor time of all threads of a process, in user and system mode; Linux tells nanoseconds."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def report(arguments: argparse.Namespace, results: dict[str, list[float]]) -> None:
    machine = {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "commit": read_commit(),
        "command": " ".join(["python", "-m", "benchmarks.server_cost", *sys.argv[1:]]),
    }
    print("What the server adds to an engine; every stream said what its engine did")
    print(f"{machine['hardware']}, Python {machine['python']}, commit {machine['commit']}")
    print(
        f"{arguments.streams} streams of {arguments.tokens} tokens, a step every {STEP_S * 1e3:g} ms, one warm-up run"
    )
    print(f"{machine['command']}\n")
    for name, values in results.items():
        goal = GOALS[name.partition(",")[0]]
        median = statistics.median(values)
        verdict = "met" if median <= goal else "MISSED"
        spread = f"{min(values):.2f} .. {max(values):.2f} of {len(values)}"
        print(f"  {name:44} median {median:8.2f}   {spread:28} goal <= {goal:g} {verdict}")
    print()
    medians = {name: statistics.median(values) for name, values in results.items()}
    print(json.dumps({"benchmark": "server_cost", **machine, "medians": medians, "values": results}))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
