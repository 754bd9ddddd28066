"""The expert exchange of one rank among many, without the others and without a network.

What a rank sends comes back as if others had sent it: as many rows as a real rank receives, whose experts are its own
rows', shifted by a rank's. Shapes, copies to and from messages and host waits are those of a real step; the time on a
network is missing, and the numbers mean nothing. Invariant: of the rows that come in K x T ids are this rank's, T being
the tokens of every rank, if tokens' experts stay what they were in the first step.

Shape letters: T tokens of a rank, C rows of an equal part, G ranks, W words of a row, E experts, K experts per token.
"""

import dataclasses
from collections.abc import Sequence

import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.ep_payload import FP8_BLOCK_SIZE
from argosy.distributed.ep_types import ROW_ALIGNMENT_WORDS, WORD_BYTES
from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.pending import Pending, Ready
from argosy.models.deepseek.config import ModelConfig


class EvenLoopback(Communicator):
    """The ep axis of rank 0. Messages are ``ep_message.py``'s, with the payload in the model's dtype, or in 8 bits with
    ``num_scales`` a row."""

    def __init__(self, size: int, config: ModelConfig, dtype: torch.dtype, num_scales: int = 0) -> None:
        super().__init__("ep", tuple(range(size)), 0, group=None, host_group=None, recorder=FlightRecorder(capacity=1))
        self._config = config
        self._dtype = dtype
        hidden_words = config.hidden_size // WORD_BYTES
        payloads = (hidden_words * dtype.itemsize, hidden_words + num_scales)
        self._payload_of = {self._row_words(payload): payload for payload in payloads}
        # Shared by all layers: they run one after another.
        self._gathered: dict[tuple[int, ...], torch.Tensor] = {}
        self._shifts: dict[tuple[int, ...], torch.Tensor] = {}

    def start_all_gather(self, x: torch.Tensor) -> Pending[torch.Tensor]:
        """``x: [C, W]`` -> [G * C, W]: its own rows, and the others', which were made in the first step."""
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
            ids = self._ids_of(x)
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

    def _row_words(self, payload_words: int) -> int:
        num_words = payload_words + 2 * self._config.num_experts_per_tok
        return num_words + -num_words % ROW_ALIGNMENT_WORDS

    def _ids_of(self, messages: torch.Tensor) -> torch.Tensor:
        first = self._payload_of[messages.shape[1]]
        return messages[:, first : first + self._config.num_experts_per_tok]

    def _draw_messages(self, x: torch.Tensor) -> torch.Tensor:
        num_rows, num_ids = self.size * x.shape[0], self._config.num_experts_per_tok
        messages = torch.zeros(num_rows, x.shape[1], dtype=torch.int32, device=x.device)
        payload = self._draw_payload(num_rows, self._payload_of[x.shape[1]], x.device)
        messages[:, : payload.shape[1]] = payload
        self._ids_of(messages).copy_(self._shift_ids(self._ids_of(x)))
        weights = torch.full((num_rows, num_ids), 1 / num_ids, device=x.device)
        first_weight = payload.shape[1] + num_ids
        messages[:, first_weight : first_weight + num_ids] = weights.view(torch.int32)
        return messages

    def _shift_ids(self, own: torch.Tensor) -> torch.Tensor:
        """``own: [C, K]`` ids -> [G * C, K]: of rank r's rows those that this rank's experts have where rank r has them
        in its own rows, so that sums come back for what was sent."""
        ranks = torch.arange(self.size, dtype=torch.int32, device=own.device).view(self.size, 1, 1)
        num_experts = self._config.n_routed_experts
        shifted = (own - ranks * (num_experts // self.size)) % num_experts
        return torch.where(own < 0, -1, shifted).flatten(0, 1)

    def _draw_payload(self, num_rows: int, num_words: int, device: torch.device) -> torch.Tensor:
        """[num_rows, num_words] int32."""
        hidden_size = self._config.hidden_size
        if num_words * WORD_BYTES == hidden_size * self._dtype.itemsize:
            return torch.randn(num_rows, hidden_size, device=device).to(self._dtype).view(torch.int32)
        # Bytes that are numbers in INT8 as in e4m3, of both signs.
        numbers = torch.randint(100, (num_rows, hidden_size), dtype=torch.uint8, device=device)
        numbers += torch.randint(2, numbers.shape, dtype=torch.uint8, device=device) * 128
        scales = torch.full((num_rows, num_words - hidden_size // WORD_BYTES), 0.01, device=device)
        return torch.cat((numbers.view(torch.int32), scales.view(torch.int32)), dim=1)


def loopback_mesh(size: int, config: ModelConfig, dtype: torch.dtype, quantization: str = "none") -> ParallelMesh:
    """Rank 0 of ``size`` replicas of one rank each, which share the experts. ``quantization``: theirs."""
    mesh = ParallelMesh.unconnected(ParallelLayout(dp_size=size), 0)
    num_scales = {"none": 0, "w8a8": 1, "fp8_block": -(-config.hidden_size // FP8_BLOCK_SIZE)}[quantization]
    return dataclasses.replace(mesh, ep=EvenLoopback(size, config, dtype, num_scales))
