"""Rotary embedding with YaRN, in the two pair layouts of DeepSeek-V3.2: interleaved in MLA, half-split in the indexer.

Invariant: cos and sin are fp32 and unscaled; YaRN's m squared is in the softmax scale.
Shapes: B sequences, S queries, P rope width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train_tiny.config import TinyConfig


@dataclass(kw_only=True, slots=True)
class Rotary:
    """cos and sin [B or 1, S, P/2] of the query positions, fp32."""

    cos: Tensor
    sin: Tensor

    def rotate_interleaved(self, x: Tensor) -> Tensor:
        """x: [B, *, S, P], pairs (0, 1), (2, 3), ..."""
        cos, sin = self._like(x)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)

    def rotate_half_split(self, x: Tensor) -> Tensor:
        """x: [B, *, S, P], pairs (i, i + P/2)"""
        cos, sin = self._like(x)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)

    def at_rows(self, rows: Tensor) -> "Rotary":
        """The tables of some query rows only."""
        return Rotary(cos=self.cos[:, rows], sin=self.sin[:, rows])

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        extra = (1,) * (x.dim() - 3)
        return tuple(t.view(t.shape[0], *extra, *t.shape[1:]) for t in (self.cos, self.sin))


def build_inverse_frequencies(config: TinyConfig) -> Tensor:
    """YaRN inverse frequencies [P/2] fp32."""
    width, yarn = config.qk_rope_head_dim, config.rope_scaling

    def correction_dim(rotations: float) -> float:
        length = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(config.rope_theta))

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), width - 1)
    base = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base * (1 - ramp) + base / yarn.factor * ramp
