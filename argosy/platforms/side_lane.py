"""Work beside work: what need not wait for its neighbours may run while they do. Start early, wait late.

A device has its own lane (``cuda.py``); here are the words for it, and the null twin. Invariant: what ``wait`` returns
does not depend on whether there is a lane.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SideWork(Protocol[T_co]):
    """Work on a lane."""

    def compute(self) -> None:
        """Now at the latest, if nothing runs beside: for what fills a pause and is read later. ``wait`` for it too."""
        ...

    def wait(self) -> T_co:
        """The result; afterwards the current stream may read it. May be called more than once."""
        ...


class SideLane(Protocol):
    """A second order of execution on one device. What is started on it later, runs there later."""

    def start(self, compute: Callable[[], T]) -> SideWork[T]:
        """``compute`` may read all that was started before, and whatever it waits for. What it reads must not be
        changed, and what it returns not be read, before ``wait``, which must be called."""
        ...


class Deferred(Generic[T]):
    """Computed when it is first asked for."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._results: list[T] = []

    def compute(self) -> None:
        if not self._results:
            self._results.append(self._compute())

    def wait(self) -> T:
        self.compute()
        return self._results[0]


class NoSideLane:
    """The null twin: one thing after the other."""

    def start(self, compute: Callable[[], T]) -> Deferred[T]:
        return Deferred(compute)
