"""Which processes of an engine a signal has stopped, and since when: ranks too, of which nothing else tells in time.

Linux tells; elsewhere none is ever found. Invariant: a process counts from the first look that found it stopped, and
anew after one that found it running.
"""

import os

from argosy.server.child_process import is_stopped


class StoppedProcesses:
    """Of the engine process ``pid``, what it has started, and what those have started."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._since_s: dict[int, float] = {}

    def complain(self, now_s: float, limit_s: float) -> str | None:
        """To be asked often. A rank that is stopped is missed by nobody while there is nothing to do, nor, for minutes,
        while an engine starts."""
        helpers = _children(self._pid)  # the fork server is one, whose children are the ranks
        family = [self._pid, *helpers, *(pid for helper in helpers for pid in _children(helper))]
        self._since_s = {pid: self._since_s.get(pid, now_s) for pid in family if is_stopped(pid)}
        for pid, since_s in self._since_s.items():
            if now_s - since_s > limit_s:
                return f"process {pid} is stopped by a signal for {now_s - since_s:.1f} s, {limit_s:g} s are allowed"
        return None


def _children(pid: int) -> list[int]:
    """Living ones, of all its threads; empty where the system does not tell."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:  # it, or a thread, ended just now
        return found
    return found
