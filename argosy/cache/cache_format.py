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
    attend_sparse,
    attend_sparse_encoded,
    decode_latent,
    encode_index_k,
    encode_latent,
    gather_cache,
    hadamard_matrix,
    index_scores,
    index_scores_encoded,
    write_cache,
)

NUMBER_FORMATS: dict[KVCacheDType, NumberFormat] = {"int8": INT8, "fp8": FP8}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDims:
    """The widths of what a layer caches of a token."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int


class CacheFormat(Protocol):
    """Caches are [num_blocks, block_size, W] of ``dtype``, W being ``latent_width`` or ``index_k_width``."""

    dtype: torch.dtype
    latent_width: int
    index_k_width: int

    def write_latent(self, cache: torch.Tensor, slot_mapping: torch.Tensor, latent: torch.Tensor) -> None:
        """``latent: [T, C]``: kv_latent after its norm, k_rope after RoPE; slot -1 writes nothing that is read."""
        ...

    def write_index_k(self, cache: torch.Tensor, slot_mapping: torch.Tensor, index_k: torch.Tensor) -> None:
        """``index_k: [T, I]``, after norm and RoPE."""
        ...

    def gather_latent(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """Whole sequences, [B, max_seq_len, C] in the model's dtype; see ``kernels.gather_cache``."""
        ...

    def attend_sparse(
        self, query: torch.Tensor, cache: torch.Tensor, topk_slots: torch.Tensor, softmax_scale: float, *, is_full: bool
    ) -> torch.Tensor:
        """``query: [T, H, C]`` -> [T, H, R]; see ``kernels.attend_sparse``."""
        ...

    def index_scores(
        self,
        index_q: torch.Tensor,
        cache: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        """``index_q: [B, T, J, I]`` on the keys of whole sequences: [B, T, max_seq_len] float32."""
        ...


class PlainFormat:
    """The model's own dtype: nothing is computed."""

    def __init__(self, dims: CacheDims, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.latent_width = dims.kv_lora_rank + dims.qk_rope_head_dim
        self.index_k_width = dims.index_head_dim
        self._rank = dims.kv_lora_rank

    def write_latent(self, cache: torch.Tensor, slot_mapping: torch.Tensor, latent: torch.Tensor) -> None:
        write_cache(cache, slot_mapping, latent)

    def write_index_k(self, cache: torch.Tensor, slot_mapping: torch.Tensor, index_k: torch.Tensor) -> None:
        write_cache(cache, slot_mapping, index_k)

    def gather_latent(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        return gather_cache(cache, block_table, max_seq_len)

    def attend_sparse(
        self, query: torch.Tensor, cache: torch.Tensor, topk_slots: torch.Tensor, softmax_scale: float, *, is_full: bool
    ) -> torch.Tensor:
        return attend_sparse(query, cache, topk_slots, self._rank, softmax_scale, is_full=is_full)

    def index_scores(
        self,
        index_q: torch.Tensor,
        cache: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        return index_scores(index_q, gather_cache(cache, block_table, max_seq_len), index_weights)


class QuantizedFormat:
    """Rows of 8-bit numbers with their scales, as bytes: ``kernels/reference_cache_rows.py`` has the layout."""

    def __init__(self, dims: CacheDims, model_dtype: torch.dtype, numbers: NumberFormat, device: torch.device) -> None:
        self.dtype = torch.uint8
        self.layout = LatentRowLayout(dims.kv_lora_rank, dims.qk_rope_head_dim, numbers)
        self.hadamard = hadamard_matrix(dims.index_head_dim, device)
        self.latent_width = self.layout.num_bytes
        self.index_k_width = dims.index_head_dim + 4
        self._numbers, self._model_dtype = numbers, model_dtype

    def write_latent(self, cache: torch.Tensor, slot_mapping: torch.Tensor, latent: torch.Tensor) -> None:
        write_cache(cache, slot_mapping, encode_latent(latent, self.layout))

    def write_index_k(self, cache: torch.Tensor, slot_mapping: torch.Tensor, index_k: torch.Tensor) -> None:
        write_cache(cache, slot_mapping, encode_index_k(index_k, self.hadamard, self._numbers))

    def gather_latent(self, cache: torch.Tensor, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        return decode_latent(gather_cache(cache, block_table, max_seq_len), self.layout, self._model_dtype)

    def attend_sparse(
        self, query: torch.Tensor, cache: torch.Tensor, topk_slots: torch.Tensor, softmax_scale: float, *, is_full: bool
    ) -> torch.Tensor:
        return attend_sparse_encoded(query, cache, topk_slots, self.layout, softmax_scale, is_full=is_full)

    def index_scores(
        self,
        index_q: torch.Tensor,
        cache: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        key_rows = gather_cache(cache, block_table, max_seq_len)
        return index_scores_encoded(index_q, key_rows, index_weights, self.hadamard, self._numbers)


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
