"""Linears and routed experts in FP8 blocks: DeepSeek's own checkpoint, computed as it is.

The arithmetic is ``linear_fp8_quantized``'s and ``grouped_mlp_fp8``'s. Dequantising is ``fp8_block.py``'s. Invariant:
scales are [ceil(out / 128), ceil(in / 128)] of the very rows that the weight holds.

Shape letters: T tokens, e local experts, D hidden, F expert width, M sorted rows.
"""

from collections.abc import Sequence

import torch
from torch import nn

from argosy.distributed.ep_types import DispatchedTokens, QuantizedRows
from argosy.kernels import grouped_mlp_fp8, grouped_mlp_fp8_quantized, linear_fp8_quantized
from argosy.quantization.fp8_block import DEFAULT_BLOCK_SIZE
from argosy.quantization.joined_rows import share_rows
from argosy.quantization.preparation import FP8Preparation
from argosy.quantization.stored_tensors import scale_inv_shape


class FP8BlockLinear(nn.Module):
    """``x: [T, in]`` -> [T, out] in x's dtype."""

    def __init__(self, in_features: int, out_features: int, *, has_ue8m0_scales: bool) -> None:
        super().__init__()
        self.weight, self.weight_scale_inv = _empty_matrices((), out_features, in_features)
        self.preparation = FP8Preparation(has_ue8m0_scales)

    def forward(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        rows = x if isinstance(x, QuantizedRows) else self.preparation.prepare(x)
        return linear_fp8_quantized(rows.numbers, rows.scale, self.weight, self.weight_scale_inv, rows.dtype)

    @classmethod
    def try_join(cls, linears: Sequence["FP8BlockLinear"]) -> "FP8BlockLinear | None":
        """See ``W8A8Linear.try_join``; None if some weight would begin within a block."""
        *uncut, last = (len(linear.weight) for linear in linears)
        if any(out_features % DEFAULT_BLOCK_SIZE[0] for out_features in uncut):
            return None
        has_ue8m0_scales = linears[0].preparation.has_ue8m0_scales
        joined = cls(linears[0].weight.shape[1], sum(uncut) + last, has_ue8m0_scales=has_ue8m0_scales)
        share_rows(joined, linears, "weight")
        share_rows(joined, linears, "weight_scale_inv")
        return joined


class FP8BlockExperts(nn.Module):
    """``gate_up_proj`` e4m3 [e, 2F, D] and ``down_proj`` e4m3 [e, D, F], with ``_scale_inv`` per block."""

    def __init__(self, num_local_experts: int, hidden_size: int, expert_width: int, *, has_ue8m0_scales: bool) -> None:
        super().__init__()
        stack = (num_local_experts,)
        self.gate_up_proj, self.gate_up_proj_scale_inv = _empty_matrices(stack, 2 * expert_width, hidden_size)
        self.down_proj, self.down_proj_scale_inv = _empty_matrices(stack, hidden_size, expert_width)
        self.preparation = FP8Preparation(has_ue8m0_scales)

    def forward(self, dispatched: DispatchedTokens) -> torch.Tensor:
        """-> the experts' output in the form of ``dispatched.hidden_states``: [M, D] or [e, capacity, D]."""
        x, counts = dispatched.hidden_states, dispatched.num_tokens_per_expert
        matrices = self.gate_up_proj, self.gate_up_proj_scale_inv, self.down_proj, self.down_proj_scale_inv
        has_ue8m0_scales, rows = self.preparation.has_ue8m0_scales, dispatched.quantized
        num_expected_rows = dispatched.num_expected_rows
        if rows is not None:
            inputs = rows.numbers, rows.scale, *matrices, counts, rows.dtype
            return grouped_mlp_fp8_quantized(
                *inputs, has_ue8m0_scales=has_ue8m0_scales, num_expected_rows=num_expected_rows
            )
        if dispatched.is_padded:  # whole capacities
            counts, num_expected_rows = torch.full_like(counts, x.shape[1]), None
        out = grouped_mlp_fp8(
            x.flatten(0, -2), *matrices, counts, has_ue8m0_scales=has_ue8m0_scales, num_expected_rows=num_expected_rows
        )
        return out.view(x.shape)


def _empty_matrices(stack: tuple[int, ...], out_size: int, in_size: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight = torch.empty(*stack, out_size, in_size, dtype=torch.float8_e4m3fn)
    scale = torch.empty(*stack, *scale_inv_shape((out_size, in_size), DEFAULT_BLOCK_SIZE), dtype=torch.float32)
    return nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)
