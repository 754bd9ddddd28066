"""What a linear does to its input before it multiplies: the work that linears of one number format can share.

Rows are quantised where they are made: behind a norm, behind the gated activation. Nothing is multiplied here.
Invariant: however rows were prepared, they are what ``prepare`` makes of the same plain rows; equal preparations make
the same.

Shape letters: T tokens, n numbers of a row, G scales of a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from argosy.distributed.ep_types import QuantizedRows
from argosy.kernels import (
    add_rms_norm,
    quantize_groups,
    quantize_per_token,
    rms_norm,
    rms_norm_quantize,
    rms_norm_quantize_groups,
    silu_mul,
    silu_mul_quantize,
    silu_mul_quantize_groups,
)


@dataclass(frozen=True, slots=True)
class NormedRows:
    """What a norm made of the residual stream."""

    rows: torch.Tensor  # [T, n]
    prepared: object  # the same rows for the linears that were asked for
    total: torch.Tensor  # [t, n], what was normed: the residual stream with all that was to be added


class Preparation(Protocol):
    """Of one number format. What is made is for linears (and experts) with an equal ``preparation``, and no other."""

    def prepare(self, x: torch.Tensor) -> object:
        """``x: [T, n]``."""
        ...

    def prepare_gated(self, gate_up: torch.Tensor) -> object:
        """``gate_up: [T, 2n]`` -> ``prepare`` of silu(gate) * up."""
        ...

    def prepare_normed(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> NormedRows:
        """``x: [T, n]``, ``delta: [T, n]`` to be added to it or None, ``weight: [n]`` float32 -> RMSNorm of the sum."""
        ...


@dataclass(frozen=True, slots=True)
class NoPreparation:
    """The null twin: linears that take their input as it is."""

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def prepare_gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_mul(gate_up)

    def prepare_normed(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> NormedRows:
        normed, total = (rms_norm(x, weight, eps), x) if delta is None else add_rms_norm(x, delta, weight, eps)
        return NormedRows(normed, normed, total)


@dataclass(frozen=True, slots=True)
class Int8Preparation:
    """INT8 with a scale per token: ``QuantizedRows`` with G = 1."""

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        return QuantizedRows(*quantize_per_token(x), x.dtype)

    def prepare_gated(self, gate_up: torch.Tensor) -> QuantizedRows:
        return QuantizedRows(*silu_mul_quantize(gate_up), gate_up.dtype)

    def prepare_normed(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> NormedRows:
        normed, total, numbers, scale = rms_norm_quantize(x, delta, weight, eps)
        return NormedRows(normed, QuantizedRows(numbers, scale, x.dtype), total)


@dataclass(frozen=True, slots=True)
class FP8Preparation:
    """e4m3 with a scale per 128 numbers: ``QuantizedRows`` with G = ceil(n / 128)."""

    has_ue8m0_scales: bool

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        return QuantizedRows(*quantize_groups(x, has_ue8m0_scales=self.has_ue8m0_scales), x.dtype)

    def prepare_gated(self, gate_up: torch.Tensor) -> QuantizedRows:
        numbers, scale = silu_mul_quantize_groups(gate_up, has_ue8m0_scales=self.has_ue8m0_scales)
        return QuantizedRows(numbers, scale, gate_up.dtype)

    def prepare_normed(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> NormedRows:
        normed, total, numbers, scale = rms_norm_quantize_groups(
            x, delta, weight, eps, has_ue8m0_scales=self.has_ue8m0_scales
        )
        return NormedRows(normed, QuantizedRows(numbers, scale, x.dtype), total)
