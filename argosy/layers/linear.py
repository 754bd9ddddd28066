"""Linear layers without bias, whole or one tensor-parallel rank's share. They never communicate.

Invariant: the weight is [out_features, in_features], as checkpoints store it, and holds this rank's part alone.
"""

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


class ColumnParallelLinear(Linear):
    """Rank r's ``out_features / tp_size`` outputs, from all inputs: its heads, or its part of an MLP's width."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, tp_size: int) -> None:
        super().__init__(in_features, out_features // tp_size, dtype)


class RowParallelLinear(Linear):
    """All outputs from rank r's ``in_features / tp_size`` inputs: a partial sum, which the caller reduces over tp."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, tp_size: int) -> None:
        super().__init__(in_features // tp_size, out_features, dtype)


class Fp32Linear(Linear):
    """A linear whose output is float32 whatever its input: index weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_fp32(x, self.weight)


class VocabParallelHead(Fp32Linear):
    """Logits of rank r's ``vocab_size / tp_size`` entries, float32."""

    def __init__(self, hidden_size: int, vocab_size: int, dtype: torch.dtype, tp_size: int) -> None:
        super().__init__(hidden_size, vocab_size // tp_size, dtype)
