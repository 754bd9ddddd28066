"""``argosy`` as a program in a session of its own, so that all its processes can be found, signalled and counted."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

END_S = 20.0  # generous: other tests may keep the cores busy
START_S = 60.0


class Program:
    """``module`` with ``arguments``, started at once."""

    def __init__(self, *arguments: str, module: str = "argosy", environment: Mapping[str, str] | None = None) -> None:
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
        )

    def wait_for_fork_server(self) -> int:
        """Its pid, when it has just begun with its imports."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.process.communicate()[1]
            for pid in self.living():
                if "forkserver" in _command_line(pid):
                    return pid
            time.sleep(0.02)
        raise AssertionError("no fork server was started")

    def wait_for_ranks(self, number: int) -> list[int]:
        """Until a fork server has ``number`` children; their pids, in rank order."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.process.communicate()[1]
            processes = self.living()
            servers = [pid for pid, parent in processes.items() if parent == self.process.pid]
            ranks = [pid for pid, parent in processes.items() if parent in servers]
            if len(ranks) == number:
                return sorted(ranks)
            time.sleep(0.05)
        raise AssertionError(f"{number} ranks did not start")

    def wait_for_line(self) -> str:
        """The next line on stdout."""
        stdout: IO[str] | None = self.process.stdout
        assert stdout is not None
        return stdout.readline()

    def end(self, timeout_s: float = END_S) -> tuple[int, str]:
        """Exit code and stderr; the rest of stdout is in ``output``.

        Fails if it does not end in time, or if any process of the session is left afterwards.
        """
        self.output, errors = self.process.communicate(timeout=timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while (left := self.living()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not left, f"processes {sorted(left)} are left"
        return self.process.returncode, errors

    def kill(self) -> None:
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def living(self) -> dict[int, int]:
        """pid -> parent pid of every living process of the session."""
        processes = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                fields = (directory / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it ended just now
                continue
            if int(fields[3]) == self.process.pid and fields[0] not in "ZX":
                processes[int(directory.name)] = int(fields[1])
        return processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
