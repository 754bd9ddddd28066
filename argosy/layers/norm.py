"""RMSNorm, and the parameters of LayerNorm: float32 weights and arithmetic."""

import torch
from torch import nn

from argosy.kernels import add_rms_norm, rms_norm
from argosy.quantization.preparation import NormedRows, Preparation


class RMSNorm(nn.Module):
    """``x: [T, n]`` -> [T, n] in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x: [T, n]``, ``delta: [T, n]`` -> (norm of their sum, the sum), both in x's dtype."""
        return add_rms_norm(x, delta, self.weight, self.eps)

    def prepare(self, x: torch.Tensor, delta: torch.Tensor | None, preparation: Preparation) -> NormedRows:
        """Norm of ``x + delta``, or of ``x`` for None, and what ``preparation`` makes of it."""
        return preparation.prepare_normed(x, delta, self.weight, self.eps)


class LayerNorm(nn.Module):
    """The parameters of a LayerNorm that is part of a cache write: ``weight`` and ``bias`` [n] float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)
