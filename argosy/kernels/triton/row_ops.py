"""``TritonRowOps``: what ``distributed`` does to rows of tokens between ranks and experts, as fused kernels.

Only the choice of kernels is here; ``distributed`` describes the operations (``RowOps``) and has their plain twin.
Invariant: no operation reads on the host what the card computes, but where a caller hands in ``num_rows`` to do so.

Shape letters: T tokens, K experts per token, G ranks, C rows of a part, N rows, D hidden, e local experts.
"""

from collections.abc import Callable
from dataclasses import Field, replace
from typing import ClassVar, Protocol, TypeVar

import torch

from argosy.kernels.triton import arrange_rows, pack_rows
from argosy.kernels.triton.sum_parts import sum_visited_parts


class TokenColumns(Protocol):
    """What becomes rows of a message."""

    @property
    def payload(self) -> tuple[torch.Tensor, ...]: ...  # int32, [T, ...] each
    @property
    def topk_ids(self) -> torch.Tensor: ...  # [T, K] int32
    @property
    def topk_weights(self) -> torch.Tensor: ...  # [T, K] float32
    @property
    def row_words(self) -> int: ...


class RowsInEightBits(Protocol):
    """What is arranged with its scales: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def numbers(self) -> torch.Tensor: ...  # [N, D]
    @property
    def scale(self) -> torch.Tensor: ...  # [N, scales of a row] float32


Rows = TypeVar("Rows", bound=RowsInEightBits)


class TritonRowOps:
    """For ``build_dispatcher(..., row_ops=...)``."""

    def pack_rows(self, tokens: TokenColumns, num_rows: int) -> torch.Tensor:
        return pack_rows.pack_rows(tokens.payload, tokens.topk_ids, tokens.topk_weights, tokens.row_words, num_rows)

    def count_routes(self, topk_ids: torch.Tensor, expert_owner: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return pack_rows.count_routes(topk_ids, expert_owner, counts)

    def pack_routes(
        self, tokens: TokenColumns, counts: torch.Tensor, places: torch.Tensor, num_rows: Callable[[], int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return pack_rows.pack_routes(
            tokens.payload, tokens.topk_ids, tokens.topk_weights, tokens.row_words, counts, places, num_rows
        )

    def arrange_rows(
        self,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        num_local_entries: int | None,
        expert_map: torch.Tensor,
        num_local_experts: int,
        *,
        is_padded: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if is_padded:
            return arrange_rows.arrange_padded(x, topk_ids, expert_map, num_local_experts)
        return arrange_rows.arrange_sorted(x, topk_ids, expert_map, num_local_experts, num_local_entries)

    def arrange_quantized(
        self,
        x: Rows,
        topk_ids: torch.Tensor,
        num_local_entries: int | None,
        expert_map: torch.Tensor,
        num_local_experts: int,
    ) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        arranged = arrange_rows.arrange_scaled(
            x.numbers, x.scale, topk_ids, expert_map, num_local_experts, num_local_entries
        )
        numbers, scale, counts, row_ids = arranged
        return replace(x, numbers=numbers, scale=scale), counts, row_ids

    def sum_visited_parts(
        self,
        parts: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_owner: torch.Tensor,
        addend: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return sum_visited_parts(parts, topk_ids, expert_owner, addend)
