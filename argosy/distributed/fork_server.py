"""What the fork server does before it imports anything large: it leaves signals to its parent, and dies with it.

``launcher.py`` names this module first among those that the server preloads; importing it is its whole use, so nobody
else may import it, and it imports nothing that takes time. Ranks undo what they inherit (``rank_process.py``).
Invariant: the server is gone when the process that started it is, also in the seconds of its imports, and so is the
temporary directory that multiprocessing made for the two.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1  # Linux: the signal this process gets when its parent dies
SHIELDED_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the launching process blocks them until the server ignores them


def _shield() -> None:
    """Ctrl-C of a terminal or SIGTERM to everybody is for the launching process, which takes the server along."""
    for number in SHIELDED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED_SIGNALS)


def _die_with_parent() -> None:
    parent, listening_at = os.getppid(), _find_own_address()
    was_orphan = not _is_in_our_session(parent)  # it was killed while Python started here

    def leave_if_orphaned(number: int, frame: FrameType | None) -> None:
        # The kernel also sends it when only the parent's thread that started us has ended; the parent stays ours then.
        if was_orphan or os.getppid() != parent:
            _remove_socket(listening_at)
            os._exit(0)  # at once: torch takes long to finalize, and the ranks live until then

    signal.signal(signal.SIGHUP, leave_if_orphaned)
    atexit.register(leave_if_orphaned, signal.SIGHUP, None)  # multiprocessing may notice first, and end this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    leave_if_orphaned(signal.SIGHUP, None)


def _is_in_our_session(parent: int) -> bool:
    """As who started us is, and whoever inherits orphans hardly ever."""
    try:
        return os.getsid(parent) == os.getsid(0)
    except OSError:  # it ended just now
        return False


def _find_own_address() -> str:
    """Of the inherited socket where multiprocessing asks this server for processes; empty if there is none."""
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else []:
        with contextlib.suppress(OSError):  # no socket
            address = _read_listening_address(int(name))
            if address:
                return address
    return ""


def _read_listening_address(file: int) -> str:
    """Empty: nobody listens there. Raises OSError if ``file`` is no open socket."""
    listener = socket.socket(fileno=file)
    try:
        is_listening = listener.family == socket.AF_UNIX and listener.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        )
        return str(listener.getsockname()) if is_listening else ""
    finally:
        listener.detach()  # it stays open: it is multiprocessing's


def _remove_socket(address: str) -> None:
    """And the directory made for it. A parent that ends in good order has done so; one that was killed could not."""
    directory = os.path.dirname(address)
    if os.path.basename(directory).startswith("pymp-"):
        with contextlib.suppress(OSError):  # a server closes this door when all its ranks have started
            os.unlink(address)
        with contextlib.suppress(OSError):
            os.rmdir(directory)


_shield()
_die_with_parent()
