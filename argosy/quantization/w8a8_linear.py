"""A linear in W8A8: int8 weights with a scale per output, activations quantised per token, sums in int32.

The arithmetic is ``kernels.linear_w8a8``'s. Invariant: ``weight`` [out, in] and ``weight_scale`` [out, 1] are named and
shaped as in the checkpoint.

Shape letters: T tokens.
"""

import torch
from torch import nn

from argosy.kernels import linear_w8a8


class W8A8Linear(nn.Module):
    """``x: [T, in]`` -> [T, out] in x's dtype. A row_parallel rank quantises its own slice of x, by its own scale."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(out_features, 1, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_w8a8(x, self.weight, self.weight_scale)
