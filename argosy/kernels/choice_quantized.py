"""As ``choice.py``, for rows that are quantised once: behind a norm or an activation, for several products.

It computes nothing. Invariant: each fused form gives what its parts give one after the other, which is what runs where
there is no kernel for it.

Shape letters: T tokens, n numbers of a row, G = ceil(n / 128) groups, M sorted rows, D hidden.
"""

from types import ModuleType

import torch

from argosy.kernels import device_fp8, device_w8a8, reference_fp8, reference_w8a8
from argosy.kernels.card import has_kernels
from argosy.kernels.choice import add_rms_norm, quantize_per_token, rms_norm, silu_mul

NormedAndQuantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# --- INT8 with a scale per token --------------------------------------------------------------------------------------


def rms_norm_quantize(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> NormedAndQuantized:
    """``rms_norm`` of ``x``, or ``add_rms_norm`` with ``delta``, then ``quantize_per_token`` -> normed [T, n], total
    [T, n] (x itself without ``delta``), int8 [T, n], scale [T, 1] f32."""
    if not has_kernels(x):
        normed, total = _add_rms_norm(x, delta, weight, eps)
        return normed, total, *quantize_per_token(normed)
    from argosy.kernels.triton import norms

    if delta is not None:
        return norms.add_rms_norm_quantize(x, delta, weight, eps)
    normed, numbers, scale = norms.rms_norm_quantize(x, weight, eps)
    return normed, x, numbers, scale


def grouped_mlp_w8a8_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    out_dtype: torch.dtype,
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference_w8a8.grouped_mlp_w8a8_quantized``. ``num_expected_rows``: see ``choice.grouped_mlp_w8a8``."""
    inputs = x, x_scale, gate_up_proj, gate_up_scale, down_proj, down_scale, num_tokens_per_expert, out_dtype
    if not has_kernels(x):
        return (reference_w8a8 if x.is_cpu else device_w8a8).grouped_mlp_w8a8_quantized(*inputs)
    from argosy.kernels.triton import w8a8

    return w8a8.grouped_mlp_w8a8_quantized(*inputs, num_expected_rows)


# --- FP8 with a scale per 128 numbers ---------------------------------------------------------------------------------


def quantize_groups(x: torch.Tensor, *, has_ue8m0_scales: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference_fp8.quantize_groups``; the scales' strides are the implementation's own."""
    if not has_kernels(x):
        return reference_fp8.quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    from argosy.kernels.triton import quantize_groups as triton_groups

    return triton_groups.quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)


def silu_mul_quantize_groups(gate_up: torch.Tensor, *, has_ue8m0_scales: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_groups`` of ``silu_mul``: ``gate_up: [T, 2n]`` -> e4m3 [T, n], scale [T, G] f32."""
    if not has_kernels(gate_up):
        return quantize_groups(silu_mul(gate_up), has_ue8m0_scales=has_ue8m0_scales)
    from argosy.kernels.triton import quantize_groups as triton_groups

    return triton_groups.silu_mul_quantize_groups(gate_up, has_ue8m0_scales=has_ue8m0_scales)


def rms_norm_quantize_groups(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, *, has_ue8m0_scales: bool
) -> NormedAndQuantized:
    """As ``rms_norm_quantize`` -> normed, total, e4m3 [T, n], scale [T, G] f32."""
    if not has_kernels(x):
        normed, total = _add_rms_norm(x, delta, weight, eps)
        return normed, total, *quantize_groups(normed, has_ue8m0_scales=has_ue8m0_scales)
    from argosy.kernels.triton import norms

    return norms.rms_norm_quantize_groups(x, delta, weight, eps, has_ue8m0_scales=has_ue8m0_scales)


def linear_fp8_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See ``reference_fp8.linear_fp8_quantized``."""
    return _fp8_of(x).linear_fp8_quantized(x, x_scale, weight, weight_scale_inv, out_dtype)


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
    """See ``reference_fp8.grouped_mlp_fp8_quantized``. ``num_expected_rows``: see ``choice.grouped_mlp_w8a8``."""
    matrices = gate_up_proj, gate_up_scale_inv, down_proj, down_scale_inv
    inputs = x, x_scale, *matrices, num_tokens_per_expert, out_dtype
    if not has_kernels(x):
        return reference_fp8.grouped_mlp_fp8_quantized(*inputs, has_ue8m0_scales=has_ue8m0_scales)
    from argosy.kernels.triton import fp8

    return fp8.grouped_mlp_fp8_quantized(
        *inputs, has_ue8m0_scales=has_ue8m0_scales, num_expected_rows=num_expected_rows
    )


def _fp8_of(x: torch.Tensor) -> ModuleType:
    if not has_kernels(x):
        return reference_fp8 if x.is_cpu else device_fp8
    from argosy.kernels.triton import fp8

    return fp8


def _add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return (rms_norm(x, weight, eps), x) if delta is None else add_rms_norm(x, delta, weight, eps)
