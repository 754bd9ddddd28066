"""A linear in W8A8: int8 weights with a scale per output, activations quantised per token, sums in int32.

The arithmetic is ``kernels.linear_w8a8_quantized``'s. Invariant: ``weight`` [out, in] and ``weight_scale`` [out, 1] are
named and shaped as in the checkpoint.

Shape letters: T tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from argosy.kernels import linear_w8a8_quantized, quantize_per_token, silu_mul_quantize


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A linear's input, quantised once for all linears that take it."""

    numbers: torch.Tensor  # [T, in] int8
    scale: torch.Tensor  # [T, 1] float32
    dtype: torch.dtype  # what it was, and what linears make of it


class W8A8Linear(nn.Module):
    """``x: [T, in]`` -> [T, out] in x's dtype. A row_parallel rank quantises its own slice of x, by its own scale."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float32), requires_grad=False)

    def prepare(self, x: torch.Tensor) -> QuantizedRows:
        return QuantizedRows(*quantize_per_token(x), x.dtype)

    def prepare_gated(self, gate_up: torch.Tensor) -> QuantizedRows:
        return QuantizedRows(*silu_mul_quantize(gate_up), gate_up.dtype)

    def forward(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        rows = x if isinstance(x, QuantizedRows) else self.prepare(x)
        return linear_w8a8_quantized(rows.numbers, rows.scale, self.weight, self.weight_scale, rows.dtype)
