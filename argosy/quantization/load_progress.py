"""How far filling a model's parameters is, told after every tensor.

Invariant: the first report is of nothing done, the last of everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from argosy.quantization.weight_plan import WeightCopy


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Bytes are those that this rank reads of the checkpoint's files, scales included."""

    num_tensors: int
    num_bytes: int
    total_tensors: int
    total_bytes: int


ProgressCallback = Callable[[LoadProgress], None]


class ProgressCounter:
    """Reports at once, and whenever a copy is done. ``report`` None: to nobody."""

    def __init__(self, plan: Sequence[WeightCopy], report: ProgressCallback | None) -> None:
        self._report = report or _report_to_nobody
        self._num_tensors = self._num_bytes = 0
        self._total_tensors, self._total_bytes = len(plan), sum(copy.read_bytes for copy in plan)
        self._tell()

    def advance(self, copy: WeightCopy) -> None:
        self._num_tensors += 1
        self._num_bytes += copy.read_bytes
        self._tell()

    def _tell(self) -> None:
        self._report(LoadProgress(self._num_tensors, self._num_bytes, self._total_tensors, self._total_bytes))


def _report_to_nobody(progress: LoadProgress) -> None:
    """The null twin of a progress bar."""
