"""One engine process as its parent sees it: started, spoken to once, watched, and ended with all it has started.

What it says over its socket is none of this file's business. The process has a session of its own, so signals of a
terminal do not reach it; it ends when its standard input does, which happens when this process ends in any way.
Invariant: after ``gone``, no process of it is left.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # Linux: the signal this process gets when its parent dies
ORPHAN_EXIT_CODE = 1  # of a child whose parent is gone
_LENGTH_BYTES = 4  # of the number before the first words
_ORPHANS_S = 2.0  # for the children of a process that died: they notice by themselves, and clean up
_POLL_S = 0.05


class ChildProcess:
    """``python -m module`` with ``arguments``, started at once in the event loop's thread.

    ``first_words`` go to its standard input, after their length; without them it waits until ``take_up``. ``on_exit``
    is called in the event loop with what became of the process, in words.

    NOTE(order): the thread that starts it must outlive it, for Linux ends a child with its parent's thread.
    """

    def __init__(
        self,
        module: str,
        first_words: bytes | None,
        name: str,
        on_exit: Callable[[str], None],
        arguments: tuple[str, ...] = (),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._on_exit = on_exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.exit_code: int | None = None  # known when ``on_exit`` is called; below 0: the signal that ended it
        self.gone: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._copy_output, name=f"{name} output", daemon=True).start()
        threading.Thread(target=self._watch, name=f"{name} watcher", daemon=True).start()
        if first_words is not None:
            self._say(first_words)

    def take_up(self, first_words: bytes, name: str, on_exit: Callable[[str], None]) -> None:
        """From now on it is ``name``, and its end is ``on_exit``'s: for one that was started without first words."""
        self._name, self._on_exit = name, on_exit
        self._say(first_words)

    def kill(self) -> None:
        """At once, also if it is stopped. The processes it has started follow."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def terminate(self) -> None:
        """Ask it to end, which it may do in its own time."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def _say(self, first_words: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended already, which is noticed
            stdin.write(len(first_words).to_bytes(_LENGTH_BYTES, "big") + first_words)
            stdin.flush()

    def _watch(self) -> None:
        code = self.exit_code = self._process.wait()
        self._tell(self._tell_exit, code)
        _end_group(self.pid)
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):
            stdin.close()
        self._tell(self._set_gone)

    def _tell_exit(self, code: int) -> None:
        self._on_exit(_explain(self._name, self.pid, code))

    def _set_gone(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)

    def _tell(self, callback: Callable[..., None], *arguments: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _copy_output(self) -> None:
        """Line by line to our own errors, until all that could write there are gone."""
        output = self._process.stdout
        assert output is not None
        with output:
            for line in output:
                text = line.decode("utf-8", "replace").rstrip("\r\n")
                with contextlib.suppress(ValueError, OSError):  # nobody reads ours any more
                    sys.stderr.write(f"[{self._name}] {text}\n")
                    sys.stderr.flush()


def die_with_parent() -> None:
    """In the child, on Linux: however the parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def take_stdin() -> int:
    """In the child: the standard input, which nobody else sees from now on."""
    stdin = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return stdin


def watch_parent(stdin_fd: int) -> None:
    """In the child, after the first words: a thread that ends it with its parent. Its own children end with it."""
    threading.Thread(target=_end_with_parent, args=(stdin_fd,), name="parent watcher", daemon=True).start()


def read_first_words(stdin_fd: int) -> bytes:
    """In the child.

    Raises:
        RuntimeError: they end too early; the parent is gone.
    """
    length = int.from_bytes(_read_exactly(stdin_fd, _LENGTH_BYTES), "big")
    return _read_exactly(stdin_fd, length)


def is_stopped(pid: int) -> bool:
    """By a signal; False for a process that is gone, and where the system does not tell."""
    fields = _read_stat(pid)
    return fields is not None and fields[0] == "T"


def _end_with_parent(stdin_fd: int) -> None:
    """The other end is open as long as the parent lives."""
    os.read(stdin_fd, 1)
    os._exit(ORPHAN_EXIT_CODE)


def _read_exactly(fd: int, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = os.read(fd, num_bytes - len(data))
        if not part:
            raise RuntimeError("standard input ended before the first words; this program is started by the server")
        data += part
    return data


def _end_group(group: int) -> None:
    """What the dead process has started ends by itself, and tidies up; what does not is killed.

    The number stays the group's while a member lives.
    """
    deadline_s = time.monotonic() + _ORPHANS_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline_s:
            os.killpg(group, 0)  # asks whether there is a member
            if sys.platform == "linux":
                states = _read_states(group)
                if not states:
                    return
                if states == {"T"}:  # they notice nothing
                    break
            time.sleep(_POLL_S)
        os.killpg(group, signal.SIGKILL)


def _read_states(group: int) -> set[str]:
    """Of its living members. The dead are members until who inherits them takes note, which may take seconds; they
    hold nothing."""
    stats = [_read_stat(name) for name in os.listdir("/proc") if name.isdigit()]
    return {fields[0] for fields in stats if fields is not None and int(fields[2]) == group and fields[0] not in "ZX"}


def _read_stat(pid: int | str) -> list[str] | None:
    """State, parent, group and more of a process; None if it is gone, or where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _explain(name: str, pid: int, code: int) -> str:
    if code >= 0:
        return f"{name} (pid {pid}) exited with code {code}; its output says why"
    hint = ", as the kernel does when memory runs out" if code == -signal.SIGKILL else ""
    return f"{name} (pid {pid}) was killed by {signal.Signals(-code).name}{hint}"
