"""The gated MLP of dense layers and shared experts: down(silu(gate(x)) * up(x))."""

import torch
from torch import nn

from argosy.layers.linear import build_column_parallel, build_row_parallel
from argosy.quantization.preparation import Preparation
from argosy.quantization.scheme import Schemes


class GatedMLP(nn.Module):
    """``gate_up_proj`` holds the checkpoint's ``gate_proj`` rows, then its ``up_proj`` rows, each this rank's share.

    With ``tp_size`` > 1 the output is a partial sum, which the caller reduces over tp.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, schemes: Schemes, tp_size: int = 1) -> None:
        super().__init__()
        self.gate_up_proj = build_column_parallel(
            schemes, ("gate_proj", "up_proj"), hidden_size, intermediate_size, tp_size
        )
        self.down_proj = build_row_parallel(schemes, "down_proj", intermediate_size, hidden_size, tp_size)

    @property
    def preparation(self) -> Preparation:
        """What its input can be prepared by."""
        return self.gate_up_proj.preparation

    def forward(self, x: object) -> torch.Tensor:
        """``x: [T, hidden_size]``, or what ``preparation`` made of it."""
        return self.down_proj(self.down_proj.preparation.prepare_gated(self.gate_up_proj(x)))
