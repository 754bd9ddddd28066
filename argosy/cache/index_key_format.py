"""What a token's index key is stored as: the model's own numbers, or 8-bit ones, rotated first, with a scale.

Index keys have a format apart from the latent's, for they are read whole, by every token, and only to choose positions.
Invariant: what is read depends on the bytes of the places read, and on nothing that a format remembers.

Shape letters: T tokens, B requests, P qk_rope_head_dim, J index heads, I index_head_dim, W width of a row.
"""

from typing import Protocol

import torch

from argosy.cache.layer_settings import CacheDims, NormSettings
from argosy.kernels import (
    NumberFormat,
    RotaryRows,
    hadamard_matrix,
    index_scores_paged,
    index_scores_paged_encoded,
    write_index_k,
    write_index_k_encoded,
)


class IndexKeyFormat(Protocol):
    """Caches are [num_blocks, block_size, W] of ``dtype``, W being ``width``."""

    dtype: torch.dtype
    width: int

    def write(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        key: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        """``key: [T, I]`` as projected: normed, its first P rotated, and written; slot -1 writes
        nothing that is read."""
        ...

    def score(
        self,
        index_q: torch.Tensor,
        cache: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        num_visible: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        """``index_q: [B, T, J, I]`` -> [B, T, max_seq_len] float32; see ``kernels.index_scores_paged``."""
        ...


class PlainIndexKeys:
    """The model's own dtype."""

    def __init__(self, dims: CacheDims, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.width = dims.index_head_dim
        self._rope_dim = dims.qk_rope_head_dim

    def write(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        key: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        assert norm.bias is not None
        write_index_k(key, norm.weight, norm.bias, norm.eps, rotary, self._rope_dim, cache, slot_mapping)

    def score(
        self,
        index_q: torch.Tensor,
        cache: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        num_visible: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        return index_scores_paged(index_q, cache, index_weights, block_table, num_visible, max_seq_len)


class EncodedIndexKeys:
    """8-bit numbers behind a Hadamard matrix, which spreads outliers, and a float32 scale, as bytes."""

    def __init__(self, dims: CacheDims, numbers: NumberFormat, device: torch.device) -> None:
        self.dtype = torch.uint8
        self.hadamard = hadamard_matrix(dims.index_head_dim, device)
        self.width = dims.index_head_dim + 4
        self._numbers = numbers
        self._rope_dim = dims.qk_rope_head_dim

    def write(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        key: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        assert norm.bias is not None
        place = (cache, slot_mapping, self.hadamard, self._numbers)
        write_index_k_encoded(key, norm.weight, norm.bias, norm.eps, rotary, self._rope_dim, *place)

    def score(
        self,
        index_q: torch.Tensor,
        cache: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        num_visible: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        return index_scores_paged_encoded(
            index_q, cache, index_weights, block_table, num_visible, max_seq_len, self.hadamard, self._numbers
        )
