"""What a cache format is told of a layer: the widths of what is cached, and the norms that a write includes."""

from dataclasses import dataclass

import torch


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
