"""``Pending``: the only form asynchrony takes in model code. Start early, wait late."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")
T = TypeVar("T")


class Pending(Protocol[T_co]):
    """A transfer in flight."""

    def wait(self) -> T_co:
        """The result; afterwards the current stream may read it."""
        ...


class Ready(Generic[T]):
    """The null twin: nothing was in flight."""

    def __init__(self, value: T) -> None:
        self._value = value

    def wait(self) -> T:
        return self._value


class Then(Generic[S, T]):
    """A transfer whose result is still to be shaped: ``finish`` runs in ``wait``, once."""

    def __init__(self, pending: Pending[S], finish: Callable[[S], T]) -> None:
        self._pending = pending
        self._finish = finish

    def wait(self) -> T:
        return self._finish(self._pending.wait())
