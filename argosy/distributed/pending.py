"""``Pending``: the only form asynchrony takes in model code. Start early, wait late."""

from typing import Generic, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)
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
