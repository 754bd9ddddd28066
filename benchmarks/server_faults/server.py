"""A server that a scenario starts for itself: its processes by kind, its metrics, and how it ended.

It runs ``argosy serve`` in a session of its own and reads only what every user sees: HTTP, the log, /proc. Invariant:
after ``end`` or ``kill`` none of its processes is left, or the names of those that are were returned.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.server_faults.client import Endpoint

START_S = 120.0
POLL_S = 0.02
_READY = re.compile(r"engine (\d+) is ready \(pid (\d+)\)")
_SPARE = re.compile(r"a spare engine is kept \(pid (\d+)\)")
_TAKEN = re.compile(r"is the spare one now \(pid (\d+)\)")


class Server:
    """``argosy serve`` with ``flags``, ready when the constructor returns, unless ``waits`` is False."""

    def __init__(self, *flags: str, waits: bool = True) -> None:
        self.lines: list[str] = []
        self.engines: dict[int, int] = {}  # pid by engine, as of the last time it was ready
        self.endpoint = Endpoint("", 0)
        self._spares: set[int] = set()
        self._seen: dict[int, str] = {}
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "argosy", "serve", "--port", "0", "--num-threads", "1", *flags],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._is_listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if waits and not (self._is_listening.wait(START_S) and self.endpoint.port):
            self.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.lines[-20:]))

    @property
    def pid(self) -> int:
        return self.process.pid

    def processes(self) -> dict[int, str]:
        """Kind by pid of all living ones: api, engine, spare, fork server, tracker, rank."""
        table = _read_processes()
        family = {self.pid} if self.pid in table else set()
        for _ in range(4):  # generations
            family |= {pid for pid, (parent, _) in table.items() if parent in family}
        kinds = {pid: _name_kind(table[pid][1]) for pid in family}
        kinds |= {pid: "api" for pid in family if pid == self.pid}
        servers = {pid for pid, kind in kinds.items() if kind == "fork server"}
        kinds |= {pid: "rank" for pid in family if table[pid][0] in servers}
        kinds |= {pid: "spare" for pid in family & self._spares}
        kinds |= {pid: "spare's" for pid in family if table[pid][0] in self._spares}  # not an engine's either
        self._seen |= kinds
        return kinds

    def pids(self, kind: str) -> list[int]:
        return sorted(pid for pid, each in self.processes().items() if each == kind)

    @property
    def has_spare(self) -> bool:
        return any(pid in self.processes() for pid in self._spares)

    async def wait_for_spare(self, limit_s: float = 90.0) -> None:
        """Until one has done its imports, which is when it has done something and does nothing any more."""
        deadline_s = time.monotonic() + limit_s
        before = 0
        while (now := sum(map(_cpu_ticks, self._spares))) == 0 or now != before:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no spare engine was ready within {limit_s:g} s")
            before = now
            await asyncio.sleep(1.0)

    async def wait_until_ready(self, limit_s: float = 120.0) -> float:
        """Seconds until ``/ready`` says yes."""
        return await self._wait_for("/ready", 200, limit_s)

    async def wait_until_lost(self, limit_s: float = 60.0) -> float:
        """Seconds until ``/health`` says that no engine serves."""
        return await self._wait_for("/health", 503, limit_s)

    async def metric(self, name: str) -> float:
        """The sum of a metric over its labels; ``name`` may contain a label: ``cache_blocks state="used"``."""
        name, _, label = name.partition(" ")
        text = (await self.endpoint.get("/metrics")).body.decode()
        lines = [line for line in text.splitlines() if re.match(rf"argosy:{name}[{{ ]", line) and label in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def end(self, how: int = signal.SIGTERM, limit_s: float = 90.0) -> tuple[int | None, list[str]]:
        """Exit code, and what is left; None if it did not end in time."""
        self.processes()
        self.process.send_signal(how)
        return self.wait(limit_s)

    def wait(self, limit_s: float = 90.0) -> tuple[int | None, list[str]]:
        try:
            code: int | None = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        return code, self.left(5.0)

    def left(self, limit_s: float) -> list[str]:
        """Processes that were seen and still live after ``limit_s``."""
        deadline_s = time.monotonic() + limit_s
        while (left := set(self._seen) & set(_read_processes())) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return [f"{self._seen[pid]} {pid}" for pid in left]

    def kill(self) -> None:
        self.processes()
        for pid in [self.pid, *self._seen]:
            if pid in _read_processes():
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    async def _wait_for(self, path: str, status: int, limit_s: float) -> float:
        started_s = time.monotonic()
        while (await self.endpoint.get(path)).status != status:
            if time.monotonic() - started_s > limit_s:
                raise TimeoutError(f"{path} was not {status} within {limit_s:g} s\n{''.join(self.lines[-10:])}")
            time.sleep(POLL_S / 4)
        return time.monotonic() - started_s

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if match := _READY.search(line):
                self.engines[int(match.group(1))] = int(match.group(2))
            if match := _SPARE.search(line):
                self._spares.add(int(match.group(1)))
            if match := _TAKEN.search(line):
                self._spares.discard(int(match.group(1)))
            if match := re.search(r"listening on http://([^:]+):(\d+)", line):
                self.endpoint = Endpoint(match.group(1), int(match.group(2)))
                self._is_listening.set()
            if len(self.lines) > 20000:
                del self.lines[:10000]
        self._is_listening.set()  # it has ended


def memory_mib(pid: int) -> float:
    """Resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def num_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def num_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def describe_machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "num_cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "commit": commit + (" with local changes" if changes else ""),
    }


def _read_processes() -> dict[int, tuple[int, str]]:
    """Parent and command line by pid of every living process."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            command = (directory / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it ended just now
            continue
        if fields[0] not in "ZX":
            found[int(directory.name)] = (int(fields[1]), command)
    return found


def _cpu_ticks(pid: int) -> int:
    """Processor time it has taken; 0 of one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _name_kind(command: str) -> str:
    if "forkserver" in command:
        return "fork server"
    if "resource_tracker" in command:
        return "tracker"
    return "engine" if "engine_process" in command else "other"


def print_outcome(outcome: dict[str, object]) -> None:
    """A card for people, then one line of JSON."""
    for name, value in outcome.items():
        print(f"  {name:32} {value}")
    print(json.dumps(outcome, default=str), flush=True)
