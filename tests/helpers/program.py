"""``argosy`` as a program in a session of its own, so that all its processes can be found, signalled and counted."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

END_S = 20.0  # generous: other tests may keep the cores busy
START_S = 60.0
LISTENING = "0A"  # the kernel's word for it in /proc/net/tcp


class Program:
    """``module`` with ``arguments``, started at once."""

    def __init__(self, *arguments: str, module: str = "argosy", environment: Mapping[str, str] | None = None) -> None:
        self.output = ""
        # Short: a socket's path has a hundred letters at most.
        self.temporary_directory = Path(tempfile.mkdtemp(prefix="argosy-test-"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
                **(environment or {}),
                "TMPDIR": str(self.temporary_directory),
            },
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

        Fails if it does not end in time, or if afterwards any process of the session is left, or a temporary directory
        of multiprocessing's.
        """
        self.output, errors = self.process.communicate(timeout=timeout_s)
        deadline_s = time.monotonic() + timeout_s
        while (left := self.living()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not left, f"processes {sorted(left)} are left"
        assert not list(self.temporary_directory.glob("pymp-*"))
        return self.process.returncode, errors

    def kill(self) -> None:
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.temporary_directory)

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

    def listening_ports(self) -> set[int]:
        """TCP ports on which processes of the session listen."""
        files = [file for pid in self.living() for file in _list(Path(f"/proc/{pid}/fd"))]
        inodes = {target.removeprefix("socket:[").removesuffix("]") for target in map(_target, files)}
        ports = set()
        for line in Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
        return ports

    def shared_memory(self) -> set[Path]:
        """Files of /dev/shm that processes of the session have mapped."""
        lines = [line for pid in self.living() for line in _read(Path(f"/proc/{pid}/maps")).splitlines()]
        return {path for path in _list(Path("/dev/shm")) if any(str(path) in line for line in lines)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _list(directory: Path) -> list[Path]:
    """Empty if its process ended just now."""
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _target(link: Path) -> str:
    """Empty if it was removed just now."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _read(file: Path) -> str:
    """Empty if its process ended just now."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
