"""What a token's place in the cache holds: the model's own numbers, or rows of 8-bit ones. Chosen once, when building.

A format writes to and reads from raw tensors that ``mla_kv_cache.py`` owns; the arithmetic is ``kernels``'. Invariant:
what is read depends on the bytes of the places read, and on nothing that a format remembers.

Shape letters: T tokens, B requests, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, S keys of one sequence,
J index heads, I index_head_dim, W width of a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from argosy.config import KVCacheDType
from argosy.kernels import (
    FP8,
    INT8,
    LatentRowLayout,
    NumberFormat,
    RotaryRows,
    attend_paged,
    attend_paged_encoded,
    attend_sparse,
    attend_sparse_encoded,
    decode_latent,
    gather_cache,
    hadamard_matrix,
    index_scores_paged,
    index_scores_paged_encoded,
    write_index_k,
    write_index_k_encoded,
    write_latent,
    write_latent_encoded,
)

NUMBER_FORMATS: dict[KVCacheDType, NumberFormat] = {"int8": INT8, "fp8": FP8}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDims:
    """The widths of what a layer caches of a token."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int


@dataclass(frozen=True, slots=True)
class NormSettings:
    """A norm that a cache write includes: RMSNorm, or LayerNorm where there is a ``bias``."""

    weight: torch.Tensor  # float32
    eps: float
    bias: torch.Tensor | None = None


class CacheFormat(Protocol):
    """Caches are [num_blocks, block_size, W] of ``dtype``, W being ``latent_width`` or ``index_k_width``."""

    dtype: torch.dtype
    latent_width: int
    index_k_width: int

    def write_latent(
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

    def write_index_k(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        key: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        """``key: [T, I]`` as projected: normed, its first P rotated, and written."""
        ...

    def gather_latent(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
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

    def index_scores(
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


class PlainFormat:
    """The model's own dtype: nothing is computed."""

    def __init__(self, dims: CacheDims, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.latent_width = dims.kv_lora_rank + dims.qk_rope_head_dim
        self.index_k_width = dims.index_head_dim
        self._rank, self._rope_dim = dims.kv_lora_rank, dims.qk_rope_head_dim

    def write_latent(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        latent: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        write_latent(latent, norm.weight, norm.eps, rotary, cache, slot_mapping)

    def write_index_k(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        key: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        assert norm.bias is not None
        write_index_k(key, norm.weight, norm.bias, norm.eps, rotary, self._rope_dim, cache, slot_mapping)

    def gather_latent(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
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

    def index_scores(
        self,
        index_q: torch.Tensor,
        cache: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        num_visible: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        return index_scores_paged(index_q, cache, index_weights, block_table, num_visible, max_seq_len)


class QuantizedFormat:
    """Rows of 8-bit numbers with their scales, as bytes: ``kernels/reference_cache_rows.py`` has the layout."""

    def __init__(self, dims: CacheDims, model_dtype: torch.dtype, numbers: NumberFormat, device: torch.device) -> None:
        self.dtype = torch.uint8
        self.layout = LatentRowLayout(dims.kv_lora_rank, dims.qk_rope_head_dim, numbers)
        self.hadamard = hadamard_matrix(dims.index_head_dim, device)
        self.latent_width = self.layout.num_bytes
        self.index_k_width = dims.index_head_dim + 4
        self._numbers, self._model_dtype = numbers, model_dtype
        self._rope_dim = dims.qk_rope_head_dim

    def write_latent(
        self,
        cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        latent: torch.Tensor,
        norm: NormSettings,
        rotary: RotaryRows,
    ) -> None:
        write_latent_encoded(latent, norm.weight, norm.eps, rotary, cache, slot_mapping, self.layout)

    def write_index_k(
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

    def gather_latent(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
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

    def index_scores(
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


def build_cache_format(
    kv_cache_dtype: KVCacheDType, dims: CacheDims, model_dtype: torch.dtype, device: torch.device
) -> CacheFormat:
    """
    Raises:
        ValueError: the model's widths do not fit the format.
    """
    check_cache_format(kv_cache_dtype, dims)
    if kv_cache_dtype == "auto":
        return PlainFormat(dims, model_dtype)
    return QuantizedFormat(dims, model_dtype, NUMBER_FORMATS[kv_cache_dtype], device)


def check_cache_format(kv_cache_dtype: KVCacheDType, dims: CacheDims) -> None:
    """Raises ValueError as ``build_cache_format``, without building anything."""
    size = dims.index_head_dim
    if kv_cache_dtype != "auto" and size & (size - 1):
        raise ValueError(
            f"kv_cache_dtype {kv_cache_dtype}: index_head_dim ({size}) must be a power of two, for index keys are "
            "rotated by a Hadamard matrix before they are quantised; set --kv-cache-dtype auto"
        )
