"""FP8 blocks on Hopper cards: quantise groups of a row, multiply e4m3 on the tensor cores, scale every 128 inputs.

Experts are two products, the second's input quantised where the first makes it, without a host sync. Invariant: what
``reference_fp8.py`` gives, within the order of float32 sums; silu has the card's own last bits.

Shape letters: see ``reference_fp8.py``.
"""

import torch

from argosy.kernels import device_fp8
from argosy.kernels.reference_fp8 import BLOCK_SIZE
from argosy.kernels.triton.fp8_gemm import IN_FEATURES_MULTIPLE, fp8_grouped_gate_up, fp8_grouped_gemm
from argosy.kernels.triton.quantize_groups import quantize_groups, quantize_real_groups


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, weight_scale_inv: torch.Tensor, *, has_ue8m0_scales: bool
) -> torch.Tensor:
    """See ``reference_fp8.linear_fp8``."""
    rows = quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    return linear_fp8_quantized(*rows, weight, weight_scale_inv, x.dtype)


def linear_fp8_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See ``reference_fp8.linear_fp8_quantized``."""
    if weight.shape[1] % IN_FEATURES_MULTIPLE:
        return device_fp8.linear_fp8_quantized(x, x_scale, weight, weight_scale_inv, out_dtype)
    return fp8_grouped_gemm(x, x_scale, weight.unsqueeze(0), weight_scale_inv.unsqueeze(0), None, out_dtype)


def grouped_mlp_fp8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale_inv: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale_inv: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    *,
    has_ue8m0_scales: bool,
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference_fp8.grouped_mlp_fp8``. ``num_expected_rows``: see ``choice.grouped_mlp_w8a8``."""
    if x.shape[1] % IN_FEATURES_MULTIPLE or down_proj.shape[2] % BLOCK_SIZE:
        return device_fp8.grouped_mlp_fp8(
            x,
            gate_up_proj,
            gate_up_scale_inv,
            down_proj,
            down_scale_inv,
            num_tokens_per_expert,
            has_ue8m0_scales=has_ue8m0_scales,
        )
    matrices = gate_up_proj, gate_up_scale_inv, down_proj, down_scale_inv
    if num_expected_rows is None:
        rows = quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    else:
        rows = quantize_real_groups(x, num_tokens_per_expert, num_expected_rows, has_ue8m0_scales=has_ue8m0_scales)
    return grouped_mlp_fp8_quantized(
        *rows,
        *matrices,
        num_tokens_per_expert,
        x.dtype,
        has_ue8m0_scales=has_ue8m0_scales,
        num_expected_rows=num_expected_rows,
    )


def grouped_mlp_fp8_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale_inv: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale_inv: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    has_ue8m0_scales: bool,
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference_fp8.grouped_mlp_fp8_quantized``. D and F are in whole blocks, as experts in FP8 always are."""
    hidden, hidden_scale = fp8_grouped_gate_up(
        x,
        x_scale,
        gate_up_proj,
        gate_up_scale_inv,
        num_tokens_per_expert,
        out_dtype,
        has_ue8m0_scales=has_ue8m0_scales,
        num_expected_rows=num_expected_rows,
    )
    return fp8_grouped_gemm(
        hidden,
        hidden_scale,
        down_proj,
        down_scale_inv,
        num_tokens_per_expert,
        out_dtype,
        num_expected_rows=num_expected_rows,
    )
