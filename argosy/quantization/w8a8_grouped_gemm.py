"""Routed experts in W8A8, stacked.

The arithmetic is ``kernels.grouped_mlp_w8a8``'s. Invariant: an expert's matrices are its checkpoint tensors, gate rows
before up rows, each row with its own scale.

Shape letters: e local experts, D hidden, F expert width, M sorted rows.
"""

import torch
from torch import nn

from argosy.distributed.ep_types import DispatchedTokens
from argosy.kernels import grouped_mlp_w8a8, grouped_mlp_w8a8_masked, grouped_mlp_w8a8_quantized
from argosy.quantization.preparation import Int8Preparation


class W8A8Experts(nn.Module):
    """``gate_up_proj`` int8 [e, 2F, D], ``down_proj`` int8 [e, D, F]; their ``_scale`` f32 [e, 2F, 1], [e, D, 1]."""

    def __init__(self, num_local_experts: int, hidden_size: int, expert_width: int) -> None:
        super().__init__()
        self.gate_up_proj, self.gate_up_proj_scale = _empty_matrices(num_local_experts, 2 * expert_width, hidden_size)
        self.down_proj, self.down_proj_scale = _empty_matrices(num_local_experts, hidden_size, expert_width)
        self.preparation = Int8Preparation()

    def forward(self, dispatched: DispatchedTokens) -> torch.Tensor:
        """-> the experts' output in the form of ``dispatched.hidden_states``: [M, D] or [e, capacity, D]."""
        matrices = self.gate_up_proj, self.gate_up_proj_scale, self.down_proj, self.down_proj_scale
        counts, rows = dispatched.num_tokens_per_expert, dispatched.quantized
        num_expected_rows = dispatched.num_expected_rows
        if rows is not None:
            inputs = rows.numbers, rows.scale, *matrices, counts, rows.dtype
            return grouped_mlp_w8a8_quantized(*inputs, num_expected_rows)
        if dispatched.is_padded:
            return grouped_mlp_w8a8_masked(dispatched.hidden_states, *matrices, counts)
        return grouped_mlp_w8a8(dispatched.hidden_states, *matrices, counts, num_expected_rows)


def _empty_matrices(num_experts: int, out_size: int, in_size: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight = torch.empty(num_experts, out_size, in_size, dtype=torch.int8)
    scale = torch.empty(num_experts, out_size, 1, dtype=torch.float32)
    return nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)
