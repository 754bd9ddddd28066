"""The table of rotation angles that MLA and the indexer share: YaRN (arXiv 2309.00071, section 3.2).

It does not rotate anything (see ``kernels``: ``rope_interleaved_`` for MLA, ``rope_half_split_`` for the indexer).
Invariant: the table covers every position below ``max_position_embeddings``.
"""

import math
from dataclasses import dataclass

import torch

from argosy.kernels import RotaryTable


@dataclass(frozen=True, kw_only=True, slots=True)
class RotarySettings:
    """What the angles depend on; ``factor`` 1 is plain RoPE."""

    rotary_dim: int
    max_positions: int
    theta: float
    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float


def build_rotary_table(settings: RotarySettings, device: torch.device) -> RotaryTable:
    """cos and sin of position * frequency: ``[max_positions, rotary_dim / 2]`` float32 each."""
    frequencies = yarn_frequencies(settings)
    positions = torch.arange(settings.max_positions, dtype=torch.float64)
    # NOTE(numerics): float32 products, as every published implementation has them; the table itself is exact to
    # float32.
    angles = torch.outer(positions.float(), frequencies.float())
    return RotaryTable(cos=angles.cos().to(device), sin=angles.sin().to(device))


def yarn_frequencies(settings: RotarySettings) -> torch.Tensor:
    """Rotation per position of each pair: ``[rotary_dim / 2]`` float64.

    Fast pairs (more than ``beta_fast`` turns over the original length) keep their frequency, slow ones (fewer than
    ``beta_slow``) are divided by ``factor``, those between are blended linearly.
    """
    dim = settings.rotary_dim
    base = settings.theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / -dim)
    if settings.factor == 1.0:
        return base
    low = max(math.floor(_pair_with_turns(settings, settings.beta_fast)), 0)
    high = min(math.ceil(_pair_with_turns(settings, settings.beta_slow)), dim - 1)
    width = max(high - low, 1e-3)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0.0, 1.0)
    return base * (1.0 - ramp) + base / settings.factor * ramp


def _pair_with_turns(settings: RotarySettings, turns: float) -> float:
    """The (fractional) pair index that makes ``turns`` full turns over the original context length."""
    numerator = settings.rotary_dim * math.log(settings.original_max_positions / (turns * 2 * math.pi))
    return numerator / (2 * math.log(settings.theta))
