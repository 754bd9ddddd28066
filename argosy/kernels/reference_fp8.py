"""The specification of computing in FP8 blocks, as DeepSeek's checkpoints are meant: plain torch, float32 sums.

Weights are e4m3 with a float32 scale per block of 128 x 128; activations are quantised here, per 128 numbers of a
token. Invariant: within a block of 128 inputs the e4m3 products are summed in float32, then scaled, then added up; what
differs between devices is the order of those sums alone.

Shape letters: T tokens, K inputs, N outputs, M sorted rows, e local experts, D hidden, F expert width.
"""

import torch
import torch.nn.functional as F

from argosy.kernels.reference import silu_mul

BLOCK_SIZE = 128
FP8_MAX = 448.0  # of float8_e4m3fn
MIN_AMAX = 1e-4  # as in DeepSeek's act_quant


def quantize_groups(x: torch.Tensor, *, has_ue8m0_scales: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [T, K]`` any float -> e4m3 [T, K] and scales [T, ceil(K / 128)] f32, one per 128 numbers of a token.

    ``has_ue8m0_scales``: scales are rounded up to powers of two, which is what the published model was trained with.
    """
    num_tokens, num_inputs = x.shape
    num_groups = -(-num_inputs // BLOCK_SIZE)
    padded = F.pad(x.float(), (0, num_groups * BLOCK_SIZE - num_inputs))
    groups = padded.view(num_tokens, num_groups, BLOCK_SIZE)
    # NOTE(numerics): divided by a tensor, because CUDA multiplies by the reciprocal of a plain number.
    scale = groups.abs().amax(dim=2, keepdim=True).clamp_(min=MIN_AMAX) / groups.new_full((), FP8_MAX)
    if has_ue8m0_scales:
        scale = _round_up_to_power_of_two(scale)
    # The quotient may exceed 448 by a rounding, and the cast would then make it NaN.
    quantized = (groups / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return quantized.flatten(1)[:, :num_inputs], scale.squeeze(2)


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, weight_scale_inv: torch.Tensor, *, has_ue8m0_scales: bool
) -> torch.Tensor:
    """``x: [T, K]``, ``weight: [N, K]`` e4m3, ``weight_scale_inv: [ceil(N / 128), ceil(K / 128)]`` f32 -> [T, N] in x's
    dtype; one rounding."""
    rows = quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    return linear_fp8_quantized(*rows, weight, weight_scale_inv, x.dtype)


def linear_fp8_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``linear_fp8`` of what ``quantize_groups`` made: ``x: [T, K]`` e4m3, ``x_scale: [T, ceil(K / 128)]`` f32."""
    output_scale = weight_scale_inv.repeat_interleave(BLOCK_SIZE, dim=0)[: weight.shape[0]]  # [N, K / 128]
    out = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    for block, (part, weight_part) in enumerate(
        zip(x.split(BLOCK_SIZE, dim=1), weight.split(BLOCK_SIZE, dim=1), strict=True)
    ):
        products = F.linear(part.float(), weight_part.float())
        out += products * x_scale[:, block : block + 1] * output_scale[:, block]
    return out.to(out_dtype)


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
    """Every expert's gated MLP on its rows: ``x: [M, D]`` sorted by expert, counts [e] int32 -> [M, D] in x's dtype.

    ``gate_up_proj: [e, 2F, D]`` and ``down_proj: [e, D, F]`` e4m3, scales f32 of their blocks of 128 x 128; F is in
    whole blocks. Rows behind the last expert's are spare: what comes out for them is unspecified.
    """
    matrices = gate_up_proj, gate_up_scale_inv, down_proj, down_scale_inv
    rows = quantize_groups(x, has_ue8m0_scales=has_ue8m0_scales)
    return grouped_mlp_fp8_quantized(
        *rows, *matrices, num_tokens_per_expert, x.dtype, has_ue8m0_scales=has_ue8m0_scales
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
) -> torch.Tensor:
    """``grouped_mlp_fp8`` of rows that were quantised before they were sorted -> [M, D] in ``out_dtype``."""
    out = torch.zeros(x.shape, dtype=out_dtype, device=x.device)
    counts = num_tokens_per_expert.tolist()
    parts = zip(_split(x, counts), _split(x_scale, counts), _split(out, counts), strict=True)
    for expert, (rows, scale, target) in enumerate(parts):
        if not len(rows):
            continue
        gate_up = linear_fp8_quantized(rows, scale, gate_up_proj[expert], gate_up_scale_inv[expert], out_dtype)
        # NOTE(numerics): rounded to x's dtype before it is quantised again, as in DeepSeek's inference/model.py.
        hidden = silu_mul(gate_up)
        target.copy_(linear_fp8(hidden, down_proj[expert], down_scale_inv[expert], has_ue8m0_scales=has_ue8m0_scales))
    return out


def _split(x: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
    return x[: sum(counts)].split(counts)


def _round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2(scale)) of positive normal numbers, exactly: in the exponent's bits, so that infinity stays."""
    return ((scale.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)
