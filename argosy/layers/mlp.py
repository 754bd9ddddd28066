"""The gated MLP of dense layers and shared experts: down(silu(gate(x)) * up(x))."""

import torch
from torch import nn

from argosy.kernels import silu_mul
from argosy.layers.linear import ColumnParallelLinear, RowParallelLinear


class GatedMLP(nn.Module):
    """``gate_up_proj`` holds the checkpoint's ``gate_proj`` rows, then its ``up_proj`` rows, each this rank's share.

    With ``tp_size`` > 1 the output is a partial sum, which the caller reduces over tp.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype, tp_size: int = 1) -> None:
        super().__init__()
        self.gate_up_proj = ColumnParallelLinear(hidden_size, 2 * intermediate_size, dtype, tp_size)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, dtype, tp_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))
