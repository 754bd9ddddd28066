"""How long the steps of a replica take: how many took how long, and each of the last ones, for people who look on.

No decision is made of it. Invariant: a step costs a count and an append, and no more than ``NUM_KEPT`` are remembered.
"""

import time
from bisect import bisect_left
from collections import deque

import msgspec

NUM_KEPT = 96
# Upper bounds in seconds, included; what takes longer is counted in one more place.
STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)


class StepTime(msgspec.Struct, frozen=True, array_like=True):
    """One step. With asynchronous scheduling: the start of one and the end of the one before."""

    end_s: float  # time.monotonic of the machine that it ran on
    duration_s: float  # without agreeing on it
    num_tokens: int  # 0: a dummy step


class StepTimes:
    """Of one replica. Dummy steps are remembered, but not counted."""

    def __init__(self) -> None:
        self.total_s = 0.0  # of all steps that were counted; it only grows
        self.counts = [0] * (len(STEP_BOUNDS_S) + 1)
        self._kept: deque[StepTime] = deque(maxlen=NUM_KEPT)

    def add(self, duration_s: float, num_tokens: int) -> None:
        """A step that ends now."""
        self._kept.append(StepTime(time.monotonic(), duration_s, num_tokens))
        if num_tokens:
            self.total_s += duration_s
            self.counts[bisect_left(STEP_BOUNDS_S, duration_s)] += 1

    def recent(self) -> list[StepTime]:
        """Oldest first."""
        return list(self._kept)
