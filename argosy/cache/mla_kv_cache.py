"""Storage of what attention remembers: latent + rope key, and the indexer's keys, in blocks.

It allocates and hands out views; which block belongs to whom is ``block_manager.py``'s business. Invariant: block 0
is the null block; its content is never read for a real token.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's cache. Views into ``MLAKVCache``: writing through them writes the cache."""

    latent: torch.Tensor  # [num_blocks, block_size, R + P]: kv_latent after its norm, then k_rope after RoPE
    index_k: torch.Tensor  # [num_blocks, block_size, index_head_dim]: after norm and RoPE


class MLAKVCache:
    """Cache of all layers, owned by the runner."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        latent_dim: int,
        index_head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_layers, num_blocks, block_size)
        self.latent = _allocate_zeros((*shape, latent_dim), dtype, device)
        self.index_k = _allocate_zeros((*shape, index_head_dim), dtype, device)
        # Built once: slicing a tensor costs microseconds, and every layer of every step asks.
        self._layers = [LayerKV(latent, index_k) for latent, index_k in zip(self.latent, self.index_k, strict=True)]

    def layer(self, layer_id: int) -> LayerKV:
        return self._layers[layer_id]

    @property
    def num_bytes(self) -> int:
        return self.latent.nbytes + self.index_k.nbytes


def kv_bytes_per_block(
    *, num_layers: int, block_size: int, latent_dim: int, index_head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one block over all layers."""
    return num_layers * block_size * (latent_dim + index_head_dim) * dtype.itemsize


def _allocate_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, because attention multiplies what lies behind a sequence's end by 0, and 0 * NaN is NaN.

    On a CPU from numpy, which takes zero pages from the kernel: a block costs memory when it is first written.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
