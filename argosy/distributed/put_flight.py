"""One-sided puts in flight, as the flight recorder sees them. It starts none (``communicator.py``).

Invariant: a record is open from the launch of this rank's put until its card has come past the wait for all others', so
that the watchdog can tell who did not come.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from argosy.distributed.flight_recorder import CollectiveRecord

T = TypeVar("T")


class PutFlight(Generic[T]):
    """Puts of this rank, and those of others that it will wait for, on its card."""

    __slots__ = ("_device", "_finish", "_record")

    def __init__(self, record: CollectiveRecord, finish: Callable[[], T], device: torch.device | None) -> None:
        """``device``: where the record's end is to be seen; None: in a recording, which ends nothing."""
        self._record = record
        self._finish = finish
        self._device = device

    def wait(self) -> T:
        value = self._finish()
        if self._device is not None and self._device.type == "cpu":
            self._record.finish()
        elif self._device is not None:
            self._record.work = _DeviceMark(self._device)
        return value


class _DeviceMark:
    """A point in a card's work."""

    __slots__ = ("_event",)

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device=device)
        self._event.record()

    def is_completed(self) -> bool:
        return self._event.query()
