"""Linears and routed experts in FP8 blocks: DeepSeek's own checkpoint, computed as it is.

The arithmetic is ``linear_fp8``'s and ``grouped_mlp_fp8``'s. Dequantising is ``fp8_block.py``'s. Invariant: scales are
[ceil(out / 128), ceil(in / 128)] of the very rows that the weight holds.

Shape letters: T tokens, e local experts, D hidden, F expert width, M sorted rows.
"""

import torch
from torch import nn

from argosy.distributed.ep_types import DispatchedTokens
from argosy.kernels import grouped_mlp_fp8, linear_fp8
from argosy.quantization.fp8_block import DEFAULT_BLOCK_SIZE
from argosy.quantization.plain_scheme import UnpreparedInput
from argosy.quantization.stored_tensors import scale_inv_shape


class FP8BlockLinear(UnpreparedInput, nn.Module):
    """``x: [T, in]`` -> [T, out] in x's dtype."""

    def __init__(self, in_features: int, out_features: int, *, has_ue8m0_scales: bool) -> None:
        super().__init__()
        self.weight, self.weight_scale_inv = _empty_matrices((), out_features, in_features)
        self._has_ue8m0_scales = has_ue8m0_scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_fp8(x, self.weight, self.weight_scale_inv, has_ue8m0_scales=self._has_ue8m0_scales)


class FP8BlockExperts(nn.Module):
    """``gate_up_proj`` e4m3 [e, 2F, D] and ``down_proj`` e4m3 [e, D, F], with ``_scale_inv`` per block."""

    def __init__(self, num_local_experts: int, hidden_size: int, expert_width: int, *, has_ue8m0_scales: bool) -> None:
        super().__init__()
        stack = (num_local_experts,)
        self.gate_up_proj, self.gate_up_proj_scale_inv = _empty_matrices(stack, 2 * expert_width, hidden_size)
        self.down_proj, self.down_proj_scale_inv = _empty_matrices(stack, hidden_size, expert_width)
        self._has_ue8m0_scales = has_ue8m0_scales

    def forward(self, dispatched: DispatchedTokens) -> torch.Tensor:
        """-> the experts' output in the form of ``dispatched.hidden_states``: [M, D] or [e, capacity, D]."""
        x, counts = dispatched.hidden_states, dispatched.num_tokens_per_expert
        if dispatched.is_padded:  # whole capacities
            counts = torch.full_like(counts, x.shape[1])
        out = grouped_mlp_fp8(
            x.flatten(0, -2),
            self.gate_up_proj,
            self.gate_up_proj_scale_inv,
            self.down_proj,
            self.down_proj_scale_inv,
            counts,
            has_ue8m0_scales=self._has_ue8m0_scales,
        )
        return out.view(x.shape)


def _empty_matrices(stack: tuple[int, ...], out_size: int, in_size: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight = torch.empty(*stack, out_size, in_size, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*stack, *scale_inv_shape((out_size, in_size), DEFAULT_BLOCK_SIZE), dtype=torch.float32)
    return nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)
