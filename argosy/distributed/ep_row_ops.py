"""``TorchRowOps``: packing, routing and arranging rows in plain torch.

It is the specification of ``argosy.kernels.triton.row_ops``, and what runs where there is no such kernel. Nothing is
sent here. Invariant: what it returns equals the fused kernels' bit by bit, sums within float32's rounding.

Shape letters: T tokens, K experts per token, G ranks of the ep axis, C rows of a part, N rows, D hidden, W words.
"""

from collections.abc import Callable

import torch

from argosy.distributed.ep_arrange import padded_rows, sorted_rows
from argosy.distributed.ep_message import pad_rows
from argosy.distributed.ep_types import ArrangedRows, PackedTokens, QuantizedRows


class TorchRowOps:
    """See ``RowOps``."""

    def pack_rows(self, tokens: PackedTokens, num_rows: int) -> torch.Tensor:
        return pad_rows(tokens, num_rows)

    def count_routes(self, topk_ids: torch.Tensor, expert_owner: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        num_ranks = counts.shape[0]
        ranks = torch.arange(num_ranks, dtype=torch.int32, device=topk_ids.device).view(num_ranks, 1, 1)
        num_entries = (expert_owner[topk_ids] == ranks).sum(dim=2, dtype=torch.int32)  # [G, T]
        is_sent = num_entries > 0
        torch.sum(torch.stack((is_sent, num_entries), dim=1), dim=2, dtype=torch.int32, out=counts)
        return torch.where(is_sent, is_sent.cumsum(dim=1, dtype=torch.int32) - 1, -1).t()

    def pack_routes(
        self, tokens: PackedTokens, counts: torch.Tensor, places: torch.Tensor, num_rows: Callable[[], int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_sent = places >= 0  # [T, G]
        token_ids = torch.nonzero_static(is_sent.t(), size=num_rows())[:, 1]  # [N], by rank, then by token
        num_rows_by_rank = counts[:, 0]
        first_rows = num_rows_by_rank.cumsum(0) - num_rows_by_rank  # [G] int64
        return tokens.rows.index_select(0, token_ids), torch.where(is_sent, places + first_rows, -1)

    def arrange_rows(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        num_local_entries: int | None,
        expert_map: torch.Tensor,
        num_local_experts: int,
        *,
        is_padded: bool,
    ) -> ArrangedRows:
        local_ids = expert_map[topk_ids]
        if is_padded:
            return padded_rows(x, local_ids, num_local_experts)
        return sorted_rows(x, local_ids, num_local_experts, num_local_entries)

    def arrange_quantized(
        self,
        x: QuantizedRows,
        topk_ids: torch.Tensor,
        num_local_entries: int | None,
        expert_map: torch.Tensor,
        num_local_experts: int,
    ) -> tuple[QuantizedRows, torch.Tensor, torch.Tensor]:
        local_ids = expert_map[topk_ids]
        num_rows = topk_ids.numel() if num_local_entries is None else num_local_entries
        numbers, counts, row_ids = sorted_rows(x.numbers, local_ids, num_local_experts, num_rows)
        scale, _, _ = sorted_rows(x.scale, local_ids, num_local_experts, num_rows)
        return QuantizedRows(numbers, scale, x.dtype), counts, row_ids

    def sum_visited_parts(
        self,
        parts: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_owner: torch.Tensor,
        addend: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_parts, num_tokens = parts.shape[0], topk_ids.shape[0]
        ranks = torch.arange(num_parts, dtype=torch.int32, device=topk_ids.device).view(num_parts, 1, 1)
        is_visited = (expert_owner[topk_ids] == ranks).any(dim=2)  # [G, T]
        sums = parts[:, :num_tokens].masked_fill(~is_visited.unsqueeze(2), 0).sum(dim=0, dtype=torch.float32)
        return sums if addend is None else (sums + addend).to(addend.dtype)
