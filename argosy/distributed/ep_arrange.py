"""Received rows -> the experts' rows, and the experts' output -> one partial sum per received row. All on this rank.

Two forms: sorted by expert, or padded to a fixed capacity per expert. No rank is known here. Invariant: an entry of a
foreign expert, or of none, contributes exactly 0, whatever stands in rows that nobody owns.

Shape letters: N received rows, D hidden, K experts per token, e local experts, M sorted rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from argosy.distributed.ep_types import (
    ArrangedRows,
    DispatchedTokens,
    QuantizedRows,
    ReceivedRows,
    ReturnPath,
    RowOps,
    SumRows,
)
from argosy.distributed.pending import Pending

ExpertLayout = Literal["sorted", "padded"]


@dataclass(frozen=True, slots=True)
class ArrangedHandle:
    """Where each entry's expert output lies, and how the sums get home."""

    row_ids: torch.Tensor  # [N, K] int64: row of the experts' output (flat over expert and capacity), -1 none
    topk_weights: torch.Tensor  # [N, K] float32
    return_path: ReturnPath
    sum_rows: SumRows

    def start_combine(self, expert_out: torch.Tensor) -> Pending[torch.Tensor]:
        return self.return_path.start(self._sum(expert_out))

    def combine_onto(self, expert_out: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        return self.return_path.start(self._sum(expert_out), addend).wait()

    def _sum(self, expert_out: torch.Tensor) -> torch.Tensor:
        hidden_size = expert_out.shape[-1]
        rows = expert_out.reshape(expert_out.shape[:-1].numel(), hidden_size)
        skips_empty = not self.return_path.reads_empty_lines
        return self.sum_rows(
            rows, self.row_ids, self.topk_weights, expert_out.dtype, is_sparse=True, skips_empty=skips_empty
        )


def arrange(
    received: ReceivedRows,
    expert_map: torch.Tensor,
    num_local_experts: int,
    *,
    is_padded: bool,
    row_ops: RowOps,
    sum_rows: SumRows,
) -> DispatchedTokens:
    """``expert_map: [E + 1]`` int32: id -> local id, ``num_local_experts`` for what is elsewhere and for -1."""
    routes = received.topk_ids, received.num_local_entries, expert_map, num_local_experts
    quantized = None
    if isinstance(received.x, QuantizedRows):
        assert not is_padded, "experts take rows in 8 bits sorted"
        quantized, counts, row_ids = row_ops.arrange_quantized(received.x, *routes)
        hidden_states = quantized.numbers
    else:
        hidden_states, counts, row_ids = row_ops.arrange_rows(received.x, *routes, is_padded=is_padded)
    num_expected_rows = None
    if received.num_local_entries is None:
        num_experts = expert_map.shape[0] - 1
        num_expected_rows = -(-received.topk_ids.numel() * num_local_experts // num_experts)
    handle = ArrangedHandle(row_ids, received.topk_weights, received.return_path, sum_rows)
    return DispatchedTokens(hidden_states, counts, handle, quantized=quantized, num_expected_rows=num_expected_rows)


def sorted_rows(x: torch.Tensor, local_ids: torch.Tensor, num_local_experts: int, num_rows: int | None) -> ArrangedRows:
    """``local_ids: [N, K]``, ``num_local_experts`` for none. M is exact where the host knows it, else N * K."""
    sorted_ids, order, expert_offsets = _sort_entries(local_ids, num_local_experts)
    if num_rows is None:
        # NOTE(sync): free on a CPU; a device must not wait, and computes with spare rows behind the last expert's.
        num_rows = int(expert_offsets[-1]) if order.is_cpu else order.shape[0]
    entries = torch.arange(order.shape[0], device=order.device)
    row_ids = torch.where(sorted_ids < num_local_experts, entries, -1)
    rows = x.index_select(0, order[:num_rows] // local_ids.shape[1])
    return rows, expert_offsets.diff().to(torch.int32), _by_entry(row_ids, order, local_ids)


def padded_rows(x: torch.Tensor, local_ids: torch.Tensor, num_local_experts: int) -> ArrangedRows:
    """``local_ids: [N, K]``, ``num_local_experts`` for none. Capacity is N: a token names an expert at most once."""
    capacity, num_experts_per_tok = local_ids.shape
    num_places = num_local_experts * capacity
    sorted_ids, order, expert_offsets = _sort_entries(local_ids, num_local_experts)
    entries = torch.arange(order.shape[0], device=order.device)
    is_routed = sorted_ids < num_local_experts
    places = sorted_ids * capacity + entries - expert_offsets[sorted_ids]
    # The place behind the last takes all entries of none; padding places read row 0, whose values nobody uses.
    sources = order.new_zeros(num_places + 1)
    sources.scatter_(0, torch.where(is_routed, places, num_places), order // num_experts_per_tok)
    rows = x.index_select(0, sources[:num_places]).view(num_local_experts, capacity, x.shape[1])
    row_ids = _by_entry(torch.where(is_routed, places, -1), order, local_ids)
    return rows, expert_offsets.diff().to(torch.int32), row_ids


def sum_rows_in_torch(
    rows: torch.Tensor,
    row_ids: torch.Tensor,
    weights: torch.Tensor | None,
    dtype: torch.dtype,
    addend: torch.Tensor | None = None,
    *,
    is_sparse: bool = False,
    skips_empty: bool = False,
) -> torch.Tensor:
    """``SumRows`` in plain torch: the slow twin of fused kernels, and what runs where there is none. Sparse and empty
    lines are no cases of their own here."""
    if addend is not None:
        return (sum_rows_in_torch(rows, row_ids, weights, torch.float32) + addend).to(dtype)
    num_lines, num_summands = row_ids.shape
    if rows.shape[0] == 0:
        return rows.new_zeros(num_lines, rows.shape[1], dtype=dtype)
    gathered = rows.index_select(0, row_ids.clamp(min=0).flatten()).float()
    gathered = gathered.view(num_lines, num_summands, rows.shape[1])
    # A weight of 0 would not do: 0 * NaN is NaN.
    gathered.masked_fill_((row_ids < 0).unsqueeze(2), 0.0)
    if weights is None:
        return gathered.sum(dim=1).to(dtype)
    return torch.bmm(weights.unsqueeze(1), gathered).squeeze(1).to(dtype)


def _sort_entries(local_ids: torch.Tensor, num_local_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> ids in order, entries (row * K + k) in that order, where each expert begins [e + 1]; none stands last."""
    sorted_ids, order = local_ids.flatten().sort(stable=True)
    experts = torch.arange(num_local_experts + 1, dtype=sorted_ids.dtype, device=sorted_ids.device)
    return sorted_ids, order, torch.searchsorted(sorted_ids, experts)


def _by_entry(row_ids_by_order: torch.Tensor, order: torch.Tensor, local_ids: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(order).scatter_(0, order, row_ids_by_order).view(local_ids.shape)
