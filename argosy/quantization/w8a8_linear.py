"""A linear in W8A8: int8 weights with a scale per output, activations quantised per token, sums in int32.

The arithmetic is ``kernels.linear_w8a8_quantized``'s. Invariant: ``weight`` [out, in] and ``weight_scale`` [out, 1] are
named and shaped as in the checkpoint.

Shape letters: T tokens.
"""

from collections.abc import Sequence

import torch
from torch import nn

from argosy.distributed.ep_types import QuantizedRows
from argosy.kernels import linear_w8a8_quantized
from argosy.quantization.joined_rows import share_rows
from argosy.quantization.preparation import Int8Preparation


class W8A8Linear(nn.Module):
    """``x: [T, in]`` -> [T, out] in x's dtype. A row_parallel rank quantises its own slice of x, by its own scale."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float32), requires_grad=False)
        self.preparation = Int8Preparation()

    def forward(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        rows = x if isinstance(x, QuantizedRows) else self.preparation.prepare(x)
        return linear_w8a8_quantized(rows.numbers, rows.scale, self.weight, self.weight_scale, rows.dtype)

    @classmethod
    def try_join(cls, linears: Sequence["W8A8Linear"]) -> "W8A8Linear | None":
        """One linear with the outputs of all, in their order; from now on they hold views of its parameters."""
        joined = cls(linears[0].weight.shape[1], sum(len(linear.weight) for linear in linears))
        share_rows(joined, linears, "weight")
        share_rows(joined, linears, "weight_scale")
        return joined
