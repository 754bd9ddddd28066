"""Random routings and small experts for tests of expert parallelism, the same on every rank, and their plain answer.

Invariant: everything follows from a ``Case``, so that each rank can make its own share and the test the whole.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from argosy.distributed.ep_payload import PayloadCodec
from argosy.distributed.ep_types import DispatchedTokens
from argosy.quantization.plain_scheme import PlainExperts

Routing = Literal["random", "one_expert", "one_rank", "some_none", "all_none"]
EXPERT_WIDTH = 12


@dataclass(frozen=True)
class Case:
    num_tokens: tuple[int, ...]  # by rank
    num_experts: int
    num_experts_per_tok: int
    routing: Routing
    hidden_size: int = 24
    seed: int = 0

    @property
    def world(self) -> int:
        return len(self.num_tokens)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.world

    def tokens(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, D] float32, topk_ids [T, K] int32, topk_weights [T, K] float32 of a rank."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + rank)
        num_tokens = self.num_tokens[rank]
        x = torch.randn(num_tokens, self.hidden_size, generator=generator)
        weights = torch.rand(num_tokens, self.num_experts_per_tok, generator=generator)
        return x, self._topk_ids(num_tokens, generator), weights

    def experts(self, local_expert_ids: range) -> PlainExperts:
        generator = torch.Generator().manual_seed(self.seed)
        gate_up = torch.randn(self.num_experts, 2 * EXPERT_WIDTH, self.hidden_size, generator=generator)
        down = torch.randn(self.num_experts, self.hidden_size, EXPERT_WIDTH, generator=generator)
        experts = PlainExperts(len(local_expert_ids), self.hidden_size, EXPERT_WIDTH, torch.float32)
        part = slice(local_expert_ids.start, local_expert_ids.stop)
        experts.gate_up_proj.copy_(gate_up[part] * 0.2)
        experts.down_proj.copy_(down[part] * 0.3)
        return experts

    def local_experts(self, rank: int) -> PlainExperts:
        first = rank * self.num_local_experts
        return self.experts(range(first, first + self.num_local_experts))

    def expected(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Every expert on every token, then the weighted choice: no sorting, no sending."""
        experts = self.experts(range(self.num_experts))
        gate, up = torch.einsum("td,efd->tef", x, experts.gate_up_proj).chunk(2, dim=-1)
        outputs = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate) * up, experts.down_proj)
        weights = torch.zeros(x.shape[0], self.num_experts + 1)
        weights.scatter_add_(1, topk_ids.long() % (self.num_experts + 1), topk_weights)  # -1 goes to the last
        return torch.einsum("te,ted->td", weights[:, : self.num_experts], outputs)

    def _topk_ids(self, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
        order = torch.rand(num_tokens, self.num_experts, generator=generator).argsort(dim=1)
        if self.routing == "one_rank":  # as many of a token's entries as fit go to the last rank
            order = order.sort(dim=1, descending=True)[0]
        ids = order[:, : self.num_experts_per_tok].to(torch.int32)
        if self.routing == "some_none":
            ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -1)
        if self.routing in ("one_expert", "all_none"):
            ids = torch.full_like(ids, -1)
        if self.routing == "one_expert":
            ids[:, 0] = self.num_experts // 2
        return ids


def poison_unowned_rows(expert_out: torch.Tensor, dispatched: DispatchedTokens) -> torch.Tensor:
    """NaN wherever the experts' output is nobody's: combine must not look there."""
    counts = dispatched.num_tokens_per_expert
    expert_out = expert_out.clone()
    if not dispatched.is_padded:
        expert_out[int(counts.sum()) :] = float("nan")
        return expert_out
    is_padding = torch.arange(expert_out.shape[1]) >= counts.unsqueeze(1)
    return expert_out.masked_fill(is_padding.unsqueeze(2), float("nan"))


def decoded(codec: PayloadCodec, x: torch.Tensor) -> torch.Tensor:
    """``x: [T, D]`` as its experts see it."""
    return codec.decode(torch.cat(codec.encode(x), dim=1), x.shape[1], x.dtype)
