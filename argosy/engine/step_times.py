"""How long steps took: seconds in all, and how many steps took how long. It reads no clock.

Invariant: counts only grow, and one of them grows with every step that is added.
"""

from bisect import bisect_left

# Upper bounds in seconds, included; what takes longer is counted in one more place.
STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)


class StepTimes:
    """Of one replica."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self.counts = [0] * (len(STEP_BOUNDS_S) + 1)

    def add(self, duration_s: float) -> None:
        self.total_s += duration_s
        self.counts[bisect_left(STEP_BOUNDS_S, duration_s)] += 1
