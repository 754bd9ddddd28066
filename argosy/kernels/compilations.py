"""How many kernels were compiled after everything that will run should have been. Importing this needs no Triton.

A kernel is compiled when it first gets arguments of a kind: while requests wait, that is a pause of seconds. Invariant:
nothing is counted before ``start_counting``.
"""

from collections.abc import Callable
from typing import Protocol

Report = Callable[[str], None]  # one line for people


class CompilationCounter(Protocol):
    """Of one process."""

    @property
    def is_needed(self) -> bool:
        """Whether anything is ever compiled here."""
        ...

    def start_counting(self) -> None:
        """From now on a compilation is one too many."""
        ...

    @property
    def num_compilations(self) -> int: ...


class NoCompilations:
    """Where nothing is compiled."""

    is_needed = False
    num_compilations = 0

    def start_counting(self) -> None:
        pass


class LateCompilations:
    """Counts what ``observe`` is told, and reports each kind once."""

    is_needed = True

    def __init__(self, report: Report) -> None:
        self._report = report
        self._is_counting = False
        self._seen: set[tuple[str, str]] = set()
        self._num_compilations = 0

    @property
    def num_compilations(self) -> int:
        return self._num_compilations

    def start_counting(self) -> None:
        self._is_counting = True

    def observe(self, kernel: str, arguments: str) -> None:
        """A kernel is compiled for ``arguments``, or read from the files of an earlier process."""
        if not self._is_counting:
            return
        self._num_compilations += 1
        if (kernel, arguments) not in self._seen:
            self._seen.add((kernel, arguments))
            self._report(f"compiled while serving, which the start should have done: {kernel} for {arguments}")
