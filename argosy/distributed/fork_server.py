"""What the fork server does before it imports anything large: it leaves signals to its parent, and dies with it.

``launcher.py`` names this module first among those that the server preloads; importing it is its whole use, so nobody
else may import it, and it imports nothing that takes time. Ranks undo what they inherit (``rank_process.py``).
Invariant: the server is gone when the process that started it is, also in the seconds of its imports.
"""

import ctypes
import os
import signal
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
    parent = os.getppid()

    def leave_if_orphaned(number: int, frame: FrameType | None) -> None:
        # The kernel also sends it when only the parent's thread that started us has ended; the parent stays ours then.
        if os.getppid() != parent:
            os._exit(0)  # at once: torch takes long to finalize, and the ranks live until then

    signal.signal(signal.SIGHUP, leave_if_orphaned)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)


_shield()
_die_with_parent()
