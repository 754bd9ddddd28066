"""Which decode steps are recorded, and which recording a step replays: numbers alone, so that all ranks choose alike.

Nothing is recorded here (``runner/graph_runner.py``). A recording has a batch size, a longest sequence and, with
several ranks, the exchange that it was recorded with. Invariant: what is chosen holds the step, and of those that do it
is the smallest.
"""

import msgspec

from argosy.config import ExchangeMode


class RecordingKey(msgspec.Struct, frozen=True):
    """One recording."""

    size: int  # requests of a replica; a smaller batch is padded
    length: int  # of the longest sequence that it serves


class RecordingTable(msgspec.Struct, frozen=True):
    """All recordings of a rank, every size with every length; equal on all ranks."""

    sizes: tuple[int, ...] = ()  # ascending
    lengths: tuple[int, ...] = ()  # ascending
    modes: tuple[ExchangeMode, ...] = ()  # parallel to sizes; empty: one rank, which exchanges nothing

    def keys(self) -> list[RecordingKey]:
        """The largest first: the others use its memory again."""
        return [RecordingKey(size, length) for size in reversed(self.sizes) for length in reversed(self.lengths)]

    def choose(self, num_requests: int, longest: int) -> RecordingKey | None:
        """``longest``: tokens of the longest sequence, 0 if the step is no decode step. None: no recording holds it."""
        size = _smallest_that_holds(num_requests, self.sizes)
        length = _smallest_that_holds(longest, self.lengths)
        return RecordingKey(size, length) if num_requests and longest and size and length else None

    def mode(self, size: int) -> ExchangeMode:
        return self.modes[self.sizes.index(size)]


NO_RECORDINGS = RecordingTable()


def _smallest_that_holds(number: int, ascending: tuple[int, ...]) -> int | None:
    return next((limit for limit in ascending if limit >= number), None)
