"""A Communicator whose peers are itself: every rank sends what this one sends, and it returns at once.

For what one process, or one card, can show of code for many: shapes, syncs, capture in a graph. Not numbers across
ranks. Invariant: an exchange of equal parts gives back its input; an all-gather, its input ``size`` times.
"""

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.pending import Pending, Ready


class LoopbackCommunicator(Communicator):
    def __init__(self, size: int, rank: int = 0) -> None:
        recorder = FlightRecorder(capacity=1)
        super().__init__("ep", tuple(range(size)), rank, group=None, host_group=None, recorder=recorder)

    def start_all_gather(self, x: torch.Tensor) -> Pending[torch.Tensor]:
        return Ready(x.repeat(self.size, *(1 for _ in x.shape[1:])))

    def start_reduce_scatter(self, x: torch.Tensor) -> Pending[torch.Tensor]:
        return Ready(x[: x.shape[0] // self.size] * self.size)
