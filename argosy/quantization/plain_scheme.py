"""Weights in the model's own dtype: the scheme of what is not quantised, and the null twin of those of what is.

It loads nothing and knows no names. Invariant: weights are [out, in], as checkpoints store them.

Shape letters: T tokens, D hidden, e local experts, F expert width, M sorted rows.
"""

import torch
import torch.nn.functional as F
from torch import nn

from argosy.distributed.ep_types import DispatchedTokens
from argosy.kernels import grouped_mlp, grouped_mlp_masked
from argosy.quantization.linear_shape import LinearShape


class PlainLinear(nn.Module):
    """``x: [T, in]`` -> [T, out] in the weight's dtype. The weight is uninitialised until the loader fills it."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class PlainExperts(nn.Module):
    """The weights of this rank's experts, stacked: ``gate_up_proj`` [e, 2F, D] and ``down_proj`` [e, D, F]."""

    def __init__(self, num_local_experts: int, hidden_size: int, expert_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = _empty_matrices(num_local_experts, 2 * expert_width, hidden_size, dtype)
        self.down_proj = _empty_matrices(num_local_experts, hidden_size, expert_width, dtype)

    def forward(self, dispatched: DispatchedTokens) -> torch.Tensor:
        """-> the experts' output in the form of ``dispatched.hidden_states``: [M, D] or [e, capacity, D]."""
        compute = grouped_mlp_masked if dispatched.is_padded else grouped_mlp
        return compute(dispatched.hidden_states, self.gate_up_proj, self.down_proj, dispatched.num_tokens_per_expert)


class PlainScheme:
    """The ``LinearScheme`` and ``ExpertScheme`` that quantises nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def fits(self, shape: LinearShape) -> bool:
        return True

    def build_linear(self, shape: LinearShape) -> PlainLinear:
        return PlainLinear(shape.local_in_features, shape.local_out_features, self._dtype)

    def build_experts(self, num_local_experts: int, hidden_size: int, expert_width: int) -> PlainExperts:
        return PlainExperts(num_local_experts, hidden_size, expert_width, self._dtype)


def _empty_matrices(num_experts: int, out_size: int, in_size: int, dtype: torch.dtype) -> nn.Parameter:
    """[num_experts, out_size, in_size]. On a CPU its memory is ordered [.., in, out]: batched products of few rows read
    that a fifth faster (``docs/log.md``, 2026-11-22)."""
    if torch.get_default_device().type == "cpu":
        weight = torch.empty(num_experts, in_size, out_size, dtype=dtype).transpose(1, 2)
    else:
        weight = torch.empty(num_experts, out_size, in_size, dtype=dtype)
    return nn.Parameter(weight, requires_grad=False)
