"""FP8 blocks on cards that multiply e4m3: cuBLAS's product of 1 x 128 groups and 128 x 128 blocks, through torch.

Capability 9.0 and newer; older cards never build a model that calls this. What runs where Triton's kernels cannot.
Invariant: each function gives what its twin in ``reference_fp8.py`` gives, within the order of float32 sums.

Shape letters: see ``reference_fp8.py``.
"""

import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType, scaled_mm

from argosy.kernels.reference import silu_mul
from argosy.kernels.reference_fp8 import quantize_groups

_SCALE_MULTIPLE = 4  # cuBLAS reads scales in vectors: of four tokens, and of a weight's four blocks along K


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, weight_scale_inv: torch.Tensor, *, has_ue8m0_scales: bool
) -> torch.Tensor:
    """See ``reference_fp8.linear_fp8``. K is divisible by 128 here, and N by 16."""
    return linear_fp8_quantized(
        *quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales), weight, weight_scale_inv, x.dtype
    )


def linear_fp8_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See ``reference_fp8.linear_fp8_quantized``."""
    num_tokens, num_outputs = x.shape[0], weight.shape[0]
    if num_tokens == 0:
        return x.new_empty(0, num_outputs, dtype=out_dtype)
    spare_tokens, spare_blocks = -num_tokens % _SCALE_MULTIPLE, -weight_scale_inv.shape[1] % _SCALE_MULTIPLE
    if spare_tokens:
        x = F.pad(x.view(torch.uint8), (0, 0, 0, spare_tokens)).view(x.dtype)
        x_scale = F.pad(x_scale, (0, 0, 0, spare_tokens))
    if spare_blocks:  # no published size
        weight_scale_inv = F.pad(weight_scale_inv, (0, spare_blocks))
    out = scaled_mm(
        x,
        weight.t(),
        x_scale.t().contiguous().t(),  # the scales of a group of all tokens lie beside each other
        ScalingType.BlockWise1x128,
        weight_scale_inv.t(),
        ScalingType.BlockWise128x128,
        output_dtype=out_dtype,
    )
    return out[:num_tokens]


def grouped_mlp_fp8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale_inv: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale_inv: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    *,
    has_ue8m0_scales: bool,
) -> torch.Tensor:
    """One expert after another. NOTE(sync): reads the counts on the host, because a view's size must be known there."""
    out = torch.empty_like(x)
    end = 0
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        start, end = end, end + count
        if count:
            gate_up = linear_fp8(
                x[start:end], gate_up_proj[expert], gate_up_scale_inv[expert], has_ue8m0_scales=has_ue8m0_scales
            )
            out[start:end] = linear_fp8(
                silu_mul(gate_up), down_proj[expert], down_scale_inv[expert], has_ue8m0_scales=has_ue8m0_scales
            )
    return out
