"""Weights in the model's own dtype: the scheme of what is not quantised, and the null twin of those of what is.

It loads nothing and knows no names. Invariant: weights are [out, in], as checkpoints store them, whatever the order of
their memory.

Shape letters: T tokens, D hidden, e local experts, F expert width, M sorted rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from argosy.distributed.ep_types import DispatchedTokens
from argosy.kernels import grouped_mlp, grouped_mlp_masked, weighted_mlp
from argosy.quantization.joined_rows import share_rows
from argosy.quantization.linear_shape import LinearShape
from argosy.quantization.preparation import NoPreparation


class PlainLinear(nn.Module):
    """``x: [T, in]`` -> [T, out] in the weight's dtype. The weight is uninitialised until the loader fills it."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        # On a CPU float32 lies in memory as [in, out], which the product with a few tokens reads faster.
        is_turned = torch.get_default_device().type == "cpu" and dtype == torch.float32
        shape = (in_features, out_features) if is_turned else (out_features, in_features)
        weight = torch.empty(shape, dtype=dtype)
        self.weight = nn.Parameter(weight.t() if is_turned else weight, requires_grad=False)
        self.preparation = NoPreparation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    @classmethod
    def try_join(cls, linears: Sequence["PlainLinear"]) -> "PlainLinear":
        """See ``W8A8Linear.try_join``; it always can."""
        out_features, in_features = sum(len(linear.weight) for linear in linears), linears[0].weight.shape[1]
        joined = cls(in_features, out_features, linears[0].weight.dtype)
        share_rows(joined, linears, "weight")
        return joined


class PlainExperts(nn.Module):
    """The weights of this rank's experts, stacked: ``gate_up_proj`` [e, 2F, D] and ``down_proj`` [e, D, F]."""

    def __init__(self, num_local_experts: int, hidden_size: int, expert_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        gate_up = torch.empty(num_local_experts, 2 * expert_width, hidden_size, dtype=dtype)
        # On a CPU the memory is ordered [D, e, F], so that the experts' second products can be taken as one.
        is_cpu = torch.get_default_device().type == "cpu"
        order = (hidden_size, num_local_experts) if is_cpu else (num_local_experts, hidden_size)
        down = torch.empty(*order, expert_width, dtype=dtype)
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down.transpose(0, 1) if is_cpu else down, requires_grad=False)
        self.preparation = NoPreparation()

    def forward(self, dispatched: DispatchedTokens) -> torch.Tensor:
        """-> the experts' output in the form of ``dispatched.hidden_states``: [M, D], [e, capacity, D] or [T, D]."""
        if dispatched.expert_weights is not None:
            return weighted_mlp(dispatched.hidden_states, self.gate_up_proj, self.down_proj, dispatched.expert_weights)
        matrices, counts = (self.gate_up_proj, self.down_proj), dispatched.num_tokens_per_expert
        if dispatched.is_padded:
            return grouped_mlp_masked(dispatched.hidden_states, *matrices, counts)
        return grouped_mlp(dispatched.hidden_states, *matrices, counts, dispatched.num_expected_rows)


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
