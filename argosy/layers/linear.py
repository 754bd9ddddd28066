"""A linear layer without bias. Invariant: the weight is [out_features, in_features], as checkpoints store it."""

import torch
import torch.nn.functional as F
from torch import nn

from argosy.kernels import linear_fp32


class Linear(nn.Module):
    """``x: [T, in]`` -> [T, out] in the weight's dtype. The weight is uninitialised until the loader fills it."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Fp32Linear(Linear):
    """A linear whose output is float32 whatever its input: router, index weights, head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_fp32(x, self.weight)
