"""The expert exchange of one rank among many, without the others and without a network.

What a rank sends comes back as if others had sent it: as many rows as a real rank receives, whose experts are drawn
evenly. Shapes, copies to and from messages and host waits are those of a real step; the time on a network is missing,
and the numbers mean nothing. Invariant: of the rows that come in, K x T ids in the mean are this rank's, T being the
tokens of every rank.

Shape letters: T tokens of a rank, C rows of an equal part, G ranks, W words of a row, E experts, K experts per token.
"""

import dataclasses
from collections.abc import Sequence

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_types import WORD_BYTES
from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.pending import Pending, Ready
from argosy.models.deepseek.config import ModelConfig
from benchmarks.steps.routing import draw_even


class EvenLoopback(Communicator):
    """The ep axis of rank 0. Messages are ``ep_message.py``'s, with the payload in the model's dtype."""

    def __init__(self, size: int, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__("ep", tuple(range(size)), 0, group=None, host_group=None, recorder=FlightRecorder(capacity=1))
        self._config = config
        self._dtype = dtype
        self._first_id = config.hidden_size * dtype.itemsize // WORD_BYTES
        self._end_ids = self._first_id + config.num_experts_per_tok
        # Shared by all layers: they run one after another.
        self._gathered: dict[tuple[int, ...], torch.Tensor] = {}
        self._shifts: dict[tuple[int, ...], torch.Tensor] = {}

    def start_all_gather(self, x: torch.Tensor) -> Pending[torch.Tensor]:
        """``x: [C, W]`` -> [G * C, W]: its own rows, and the others', which were drawn once."""
        gathered = self._gathered.get(x.shape)
        if gathered is None:
            gathered = self._gathered[x.shape] = self._draw_messages(x)
        gathered[: x.shape[0]].copy_(x)
        return Ready(gathered)

    def start_all_to_all_v(
        self, x: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Pending[torch.Tensor]:
        """Rows for rank r come back as rows of rank r: of its experts' ids they make this rank's. Sums come back as
        they are."""
        if x.dtype == torch.int32 and x.shape[0]:
            ids = x[:, self._first_id : self._end_ids]
            ids.sub_(self._shift(send_counts, x.device)).remainder_(self._config.n_routed_experts)
        return Ready(x)

    def _shift(self, send_counts: Sequence[int], device: torch.device) -> torch.Tensor:
        """The first expert of each row's destination, [N, 1]; made once for each lengths."""
        key = tuple(send_counts)
        if key not in self._shifts:
            num_local_experts = self._config.n_routed_experts // self.size
            first = torch.arange(self.size, dtype=torch.int32) * num_local_experts
            self._shifts[key] = first.repeat_interleave(torch.tensor(key)).unsqueeze(1).to(device)
        return self._shifts[key]

    def _draw_messages(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = self.size * x.shape[0]
        messages = torch.zeros(num_rows, x.shape[1], dtype=torch.int32, device=x.device)
        payload = torch.randn(num_rows, self._config.hidden_size, device=x.device).to(self._dtype)
        messages[:, : self._first_id] = payload.view(torch.int32)
        messages[:, self._first_id : self._end_ids] = draw_even(self._config, num_rows, seed=1).to(x.device)
        weights = torch.full(
            (num_rows, self._config.num_experts_per_tok), 1 / self._config.num_experts_per_tok, device=x.device
        )
        end_weights = self._end_ids + self._config.num_experts_per_tok
        messages[:, self._end_ids : end_weights] = weights.view(torch.int32)
        return messages


def loopback_mesh(size: int, config: ModelConfig, dtype: torch.dtype) -> ParallelMesh:
    """Rank 0 of ``size`` replicas of one rank each, which share the experts."""
    mesh = ParallelMesh.unconnected(ParallelLayout(dp_size=size), 0)
    return dataclasses.replace(mesh, ep=EvenLoopback(size, config, dtype))
