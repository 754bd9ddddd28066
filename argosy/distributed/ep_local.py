"""``LocalDispatcher``: all experts are on this rank, so dispatch sorts and combine unsorts.

Nothing travels, and a few tokens of a model with few experts need not even be sorted. Invariant: every shape depends on
T and K alone; no count of a device is read on the host.

Shape letters: T tokens, D hidden, K experts per token, M routed rows (T * K), e local experts.
"""

from dataclasses import dataclass

import numpy as np
import torch

from argosy.distributed.ep_types import (
    SINGLE_RANK_PLAN,
    AddsAfterwards,
    DispatchedTokens,
    DispatchHandle,
    ExchangePlan,
    QuantizedRows,
    RowOps,
    SpreadWeights,
    SumRows,
)
from argosy.distributed.pending import Pending, Ready

MIN_WHOLE_TOKENS = 4  # fewer leave most experts idle
MAX_WHOLE_SHARE = 4  # experts per expert that a token visits


@dataclass(frozen=True, slots=True)
class LocalHandle(AddsAfterwards):
    """Undoes the sort."""

    routed_to_sorted: torch.Tensor  # [T * K] int64: token * K + k -> row of the dispatched tokens
    topk_weights: torch.Tensor  # [T, K] float32

    def start_combine(self, expert_out: torch.Tensor) -> Pending[torch.Tensor]:
        num_tokens, num_experts_per_tok = self.topk_weights.shape
        routed = expert_out.index_select(0, self.routed_to_sorted).view(
            num_tokens, num_experts_per_tok, expert_out.shape[1]
        )
        return Ready(torch.bmm(self.topk_weights.unsqueeze(1), routed.float()).squeeze(1))


@dataclass(frozen=True, slots=True)
class FusedRows:
    """Kernels in place of torch's sort and gathers."""

    row_ops: RowOps
    sum_rows: SumRows


@dataclass(frozen=True, slots=True)
class FusedHandle:
    """Where each entry's expert output lies."""

    row_ids: torch.Tensor  # [T, K] int64, -1 none
    topk_weights: torch.Tensor  # [T, K] float32
    sum_rows: SumRows

    def start_combine(self, expert_out: torch.Tensor) -> Pending[torch.Tensor]:
        return Ready(self.sum_rows(expert_out, self.row_ids, self.topk_weights, torch.float32))

    def combine_onto(self, expert_out: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        return self.sum_rows(expert_out, self.row_ids, self.topk_weights, addend.dtype, addend)


class WholeHandle(AddsAfterwards):
    """The experts have summed already."""

    def start_combine(self, expert_out: torch.Tensor) -> Pending[torch.Tensor]:
        return Ready(expert_out.float())


def spread_weights_on_host(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk_ids: [T, K]``, -1 none, and their weights, on a CPU -> each expert's weight for each token [T, E] float32,
    and its tokens [E] int32."""
    ids = topk_ids.numpy()
    # One column more than experts: -1 finds it, and it is left out.
    weights = np.zeros((len(ids), num_experts + 1), dtype=np.float32)
    weights[np.arange(len(ids))[:, None], ids] = topk_weights.numpy()
    counts = np.bincount(ids[ids >= 0], minlength=num_experts).astype(np.int32)
    return torch.from_numpy(weights)[:, :num_experts], torch.from_numpy(counts)


class LocalDispatcher:
    """An id of -1 is computed by expert 0 with weight 0, which keeps shapes fixed.

    On a CPU, up to ``max_whole_tokens`` are handed to all experts together: two large products then replace the sort
    and many small ones. It pays while a token visits a quarter of the experts at least.
    With ``fused`` kernels rows are arranged as those that came from other ranks are; only known ids are computed then.
    """

    def __init__(
        self,
        num_experts: int,
        max_whole_tokens: int = 0,
        fused: FusedRows | None = None,
        spread_weights: SpreadWeights = spread_weights_on_host,
    ) -> None:
        self._num_experts = num_experts
        self._max_whole_tokens = max_whole_tokens
        self._spread_weights = spread_weights
        self._fused = fused
        # id -> itself, on the device of the module that is being built; the last entry is for -1, which is nobody's.
        self._expert_map = torch.arange(num_experts + 1, dtype=torch.int32) if fused else None

    @property
    def takes_quantized(self) -> bool:
        return self._fused is not None

    def start_dispatch(
        self,
        x: torch.Tensor | QuantizedRows,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        plan: ExchangePlan = SINGLE_RANK_PLAN,
    ) -> Pending[DispatchedTokens]:
        num_tokens, num_experts_per_tok = topk_ids.shape
        if isinstance(x, QuantizedRows):
            assert self._fused is not None
            return Ready(self._dispatch_quantized(self._fused, x, topk_ids, topk_weights))
        is_few = MIN_WHOLE_TOKENS <= num_tokens <= self._max_whole_tokens
        if is_few and num_experts_per_tok * MAX_WHOLE_SHARE >= self._num_experts:
            return Ready(self._dispatch_whole(x, topk_ids, topk_weights))
        if self._fused is not None:
            return Ready(self._dispatch_fused(self._fused, x, topk_ids, topk_weights))
        is_none = topk_ids < 0
        routed_ids = topk_ids.masked_fill(is_none, 0).flatten()
        sort = sort_by_expert_on_host if routed_ids.is_cpu else sort_by_expert
        order, routed_to_sorted, counts = sort(routed_ids, self._num_experts)
        handle = LocalHandle(routed_to_sorted, topk_weights.masked_fill(is_none, 0.0))
        return Ready(DispatchedTokens(x.index_select(0, order // topk_ids.shape[1]), counts, handle))

    def start_combine(self, expert_out: torch.Tensor, handle: DispatchHandle) -> Pending[torch.Tensor]:
        return handle.start_combine(expert_out)

    def combine_onto(self, expert_out: torch.Tensor, handle: DispatchHandle, addend: torch.Tensor) -> torch.Tensor:
        return handle.combine_onto(expert_out, addend)

    def _dispatch_fused(
        self, fused: FusedRows, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> DispatchedTokens:
        assert self._expert_map is not None
        rows, counts, row_ids = fused.row_ops.arrange_rows(
            x, topk_ids, None, self._expert_map, self._num_experts, is_padded=False
        )
        return DispatchedTokens(rows, counts, FusedHandle(row_ids, topk_weights, fused.sum_rows))

    def _dispatch_quantized(
        self, fused: FusedRows, x: QuantizedRows, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> DispatchedTokens:
        """Each token was quantised once, and not once for each of its experts."""
        assert self._expert_map is not None
        rows, counts, row_ids = fused.row_ops.arrange_quantized(x, topk_ids, None, self._expert_map, self._num_experts)
        handle = FusedHandle(row_ids, topk_weights, fused.sum_rows)
        return DispatchedTokens(rows.numbers, counts, handle, quantized=rows)

    def _dispatch_whole(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> DispatchedTokens:
        expert_weights, counts = self._spread_weights(topk_ids, topk_weights, self._num_experts)
        return DispatchedTokens(x, counts, WholeHandle(), expert_weights)


def sort_by_expert(routed_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``routed_ids: [M]`` int32 in [0, E) -> order [M], its inverse [M] (both int64), rows of each expert [E] int32."""
    sorted_ids, order = routed_ids.sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=sorted_ids.dtype, device=routed_ids.device)
    return order, order.argsort(), torch.searchsorted(sorted_ids, experts).diff().to(torch.int32)


def sort_by_expert_on_host(
    routed_ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fast twin for CPU tensors: numpy's calls cost a fifth of torch's."""
    ids = routed_ids.numpy()
    order = ids.argsort(kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    counts = np.bincount(ids, minlength=num_experts).astype(np.int32)
    return torch.from_numpy(order), torch.from_numpy(inverse), torch.from_numpy(counts)
