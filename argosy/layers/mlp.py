"""The gated MLP of dense layers and shared experts: down(silu(gate(x)) * up(x))."""

import torch
from torch import nn

from argosy.kernels import silu_mul
from argosy.layers.linear import Linear


class GatedMLP(nn.Module):
    """``gate_up_proj`` holds the checkpoint's ``gate_proj`` rows, then its ``up_proj`` rows."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))
