"""Bringing tokens to their experts and back: ``dispatch -> experts -> combine`` as a pipeline of values.

What combine needs travels in the handle that dispatch returns; a dispatcher keeps no state of a step. Invariant:
combine returns, for every token, the sum of its experts' outputs times ``topk_weights``; ids of -1 contribute nothing.

Shape letters: T tokens, D hidden, K experts per token, M routed rows, e local experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from argosy.distributed.pending import Pending, Ready


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """Rows for this rank's experts, sorted by expert."""

    hidden_states: torch.Tensor  # [M, D]
    num_tokens_per_expert: torch.Tensor  # [e] int32, sums to M
    handle: "DispatchHandle"


@dataclass(frozen=True, slots=True)
class DispatchHandle:
    """What combine needs to undo the dispatch."""

    routed_to_sorted: torch.Tensor  # [T * K] int64: token * K + k -> row of the dispatched tokens
    topk_weights: torch.Tensor  # [T, K] float32


class TokenDispatcher(Protocol):
    """Moves tokens to experts and sums what comes back."""

    def start_dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Pending[DispatchedTokens]:
        """``x: [T, D]``, ``topk_ids: [T, K]`` int32 (-1 none), ``topk_weights: [T, K]`` f32."""
        ...

    def start_combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        """``expert_out: [M, D]`` in dispatched order -> [T, D] float32."""
        ...


class LocalDispatcher:
    """All experts are here: sort, and unsort.

    An id of -1 is computed by expert 0 with weight 0: every shape then depends on T and K alone, and no count is read
    on the host.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def start_dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Pending[DispatchedTokens]:
        is_none = topk_ids < 0
        sorted_ids, order = topk_ids.masked_fill(is_none, 0).flatten().sort(stable=True)
        experts = torch.arange(self._num_experts + 1, dtype=sorted_ids.dtype, device=x.device)
        counts = torch.searchsorted(sorted_ids, experts).diff().to(torch.int32)
        handle = DispatchHandle(order.argsort(), topk_weights.masked_fill(is_none, 0.0))
        return Ready(DispatchedTokens(x.index_select(0, order // topk_ids.shape[1]), counts, handle))

    def start_combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        num_tokens, num_experts_per_tok = handle.topk_weights.shape
        routed = expert_out.index_select(0, handle.routed_to_sorted).view(
            num_tokens, num_experts_per_tok, expert_out.shape[1]
        )
        return Ready(torch.bmm(handle.topk_weights.unsqueeze(1), routed.float()).squeeze(1))
