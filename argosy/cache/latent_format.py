"""What a token's latent and rope key are stored as: the model's own numbers, or rows of 8-bit ones.

A format writes to and reads from raw tensors that ``mla_kv_cache.py`` owns; the arithmetic is ``kernels``'. Invariant:
what is read depends on the bytes of the places read, and on nothing that a format remembers.

Shape letters: T tokens, B requests, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, W width of a row.
"""

from typing import Protocol

import torch

from argosy.cache.layer_settings import CacheDims, NormSettings
from argosy.kernels import (
    LatentRowLayout,
    NumberFormat,
    RotaryRows,
    attend_paged,
    attend_paged_encoded,
    attend_sparse,
    attend_sparse_encoded,
    decode_latent,
    gather_cache,
    write_latent,
    write_latent_encoded,
)


class LatentFormat(Protocol):
    """Caches are [num_blocks, block_size, W] of ``dtype``, W being ``width``."""

    dtype: torch.dtype
    width: int

    def write(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        latent: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        """``latent: [T, C]`` as projected, changed: the first R are normed, the rest rotated, and written; slot -1
        writes nothing that is read."""
        ...

    def gather(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """Whole sequences, [B, max_seq_len, C] in the model's dtype; see ``kernels.gather_cache``."""
        ...

    def attend_sparse(
        self, query: torch.Tensor, cache: torch.Tensor, topk_slots: torch.Tensor, softmax_scale: float, *, is_full: bool
    ) -> torch.Tensor:
        """``query: [T, H, C]`` -> [T, H, R]; see ``kernels.attend_sparse``."""
        ...

    def attend_paged(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        """``query: [B, H, C]`` on whole sequences -> [B, H, R]; see ``kernels.attend_paged``."""
        ...


class PlainLatents:
    """The model's own dtype: nothing is computed."""

    def __init__(self, dims: CacheDims, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.width = dims.kv_lora_rank + dims.qk_rope_head_dim
        self._rank = dims.kv_lora_rank

    def write(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        latent: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        write_latent(latent, norm.weight, norm.eps, rotary, cache, slot_mapping)

    def gather(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        return gather_cache(cache, block_table, max_seq_len)

    def attend_sparse(
        self, query: torch.Tensor, cache: torch.Tensor, topk_slots: torch.Tensor, softmax_scale: float, *, is_full: bool
    ) -> torch.Tensor:
        return attend_sparse(query, cache, topk_slots, self._rank, softmax_scale, is_full=is_full)

    def attend_paged(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        return attend_paged(query, cache, block_table, seq_lens, max_seq_len, self._rank, softmax_scale)


class EncodedLatents:
    """Rows of 8-bit numbers with their scales, as bytes: ``kernels/reference_cache_rows.py`` has the layout."""

    def __init__(self, dims: CacheDims, model_dtype: torch.dtype, numbers: NumberFormat) -> None:
        self.dtype = torch.uint8
        self.layout = LatentRowLayout(dims.kv_lora_rank, dims.qk_rope_head_dim, numbers)
        self.width = self.layout.num_bytes
        self._model_dtype = model_dtype

    def write(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        latent: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        write_latent_encoded(latent, norm.weight, norm.eps, rotary, cache, slot_mapping, self.layout)

    def gather(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        return decode_latent(gather_cache(cache, block_table, max_seq_len), self.layout, self._model_dtype)

    def attend_sparse(
        self, query: torch.Tensor, cache: torch.Tensor, topk_slots: torch.Tensor, softmax_scale: float, *, is_full: bool
    ) -> torch.Tensor:
        return attend_sparse_encoded(query, cache, topk_slots, self.layout, softmax_scale, is_full=is_full)

    def attend_paged(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        return attend_paged_encoded(query, cache, block_table, seq_lens, max_seq_len, self.layout, softmax_scale)
