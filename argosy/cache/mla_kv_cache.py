"""Storage of what attention remembers: latent + rope key, and the indexer's keys, in blocks.

It allocates and hands out views; which block belongs to whom is ``block_manager.py``'s business, and what a token's
place holds is ``cache_format.py``'s. Invariant: block 0 is the null block; its content is never read for a real token.

Shape letters: T tokens, B requests, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, S keys of one sequence,
J index heads, I index_head_dim.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from argosy.cache.cache_format import CacheFormat
from argosy.cache.layer_settings import NormSettings
from argosy.kernels import RotaryRows


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's cache. Views into ``MLAKVCache``: writing through them writes the cache."""

    latent: torch.Tensor  # [num_blocks, block_size, width]: kv_latent after its norm, then k_rope after RoPE
    index_k: torch.Tensor  # [num_blocks, block_size, width]: after norm and RoPE
    format: CacheFormat

    @property
    def block_size(self) -> int:
        return self.latent.shape[1]

    def write_latent(
        self, slot_mapping: torch.Tensor, latent: torch.Tensor, norm: NormSettings, rotary: RotaryRows
    ) -> None:
        """``latent: [T, C]`` as projected, changed, to the slots [T]; -1 writes nothing."""
        self.format.latents.write(self.latent, slot_mapping, latent, norm, rotary)

    def write_index_k(
        self, slot_mapping: torch.Tensor, key: torch.Tensor, norm: NormSettings, rotary: RotaryRows
    ) -> None:
        """``key: [T, I]`` as projected, to the slots [T]; -1 writes nothing."""
        self.format.index_keys.write(self.index_k, slot_mapping, key, norm, rotary)

    def gather_latent(self, block_table: torch.Tensor, max_seq_len: int) -> torch.Tensor:
        """Whole sequences: [B, max_seq_len, C]; beyond a sequence's end lies anything finite."""
        return self.format.latents.gather(self.latent, block_table, max_seq_len)

    def attend_sparse(
        self, query: torch.Tensor, topk_slots: torch.Tensor, softmax_scale: float, *, is_full: bool = False
    ) -> torch.Tensor:
        """``query: [T, H, C]`` on the slots [T, index_topk], -1 none; ``is_full``: there is no -1. [T, H, R]."""
        return self.format.latents.attend_sparse(query, self.latent, topk_slots, softmax_scale, is_full=is_full)

    def attend_paged(
        self,
        query: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        max_seq_len: int,
        softmax_scale: float,
    ) -> torch.Tensor:
        """``query: [B, H, C]`` on whole sequences of ``seq_lens: [B]`` -> [B, H, R]."""
        return self.format.latents.attend_paged(query, self.latent, block_table, seq_lens, max_seq_len, softmax_scale)

    def index_scores(
        self,
        index_q: torch.Tensor,
        index_weights: torch.Tensor,
        block_table: torch.Tensor,
        num_visible: torch.Tensor,
        max_seq_len: int,
    ) -> torch.Tensor:
        """``index_q: [B, T, J, I]``, ``index_weights: [B, T, J]`` -> [B, T, max_seq_len] float32, of which a token's
        first ``num_visible: [B, T]`` are specified."""
        return self.format.index_keys.score(index_q, self.index_k, index_weights, block_table, num_visible, max_seq_len)


class MLAKVCache:
    """Cache of all layers, owned by the runner."""

    def __init__(
        self,
        cache_format: CacheFormat,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.format = cache_format
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_layers, num_blocks, block_size)
        latents, index_keys = cache_format.latents, cache_format.index_keys
        self.latent = _allocate_zeros((*shape, latents.width), latents.dtype, device)
        self.index_k = _allocate_zeros((*shape, index_keys.width), index_keys.dtype, device)
        # Built once: slicing a tensor costs microseconds, and every layer of every step asks.
        self._layers = [
            LayerKV(latent, index_k, cache_format) for latent, index_k in zip(self.latent, self.index_k, strict=True)
        ]

    def layer(self, layer_id: int) -> LayerKV:
        return self._layers[layer_id]

    @property
    def num_bytes(self) -> int:
        return self.latent.nbytes + self.index_k.nbytes


def kv_bytes_per_block(cache_format: CacheFormat, *, num_layers: int, block_size: int) -> int:
    """Bytes of one block over all layers."""
    return num_layers * block_size * cache_format.bytes_per_token


def _allocate_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, because attention multiplies what lies behind a sequence's end by 0, and 0 * NaN is NaN.

    On a CPU from numpy, which takes zero pages from the kernel: a block costs memory when it is first written.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
