"""The specification of W8A8: what every device must give bit for bit, in plain loops over 64-bit integers.

Slow, and meant for tests; ``choice.py`` picks what runs. Invariant: sums of products are exact integers, and a row's
result depends on nothing but the row and the weights: not on the batch, not on the device.

Shape letters: T tokens, M sorted rows, K inputs, N outputs, e local experts, D hidden, F expert width.
"""

import torch

from argosy.kernels.reference import silu_mul

INT8_MAX = 127.0
# A row of zeros has this amax, so that its scale divides; smaller rows round to zero. As in the converter.
MIN_AMAX = 1e-12


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [T, K]`` any float -> int8 [T, K] and activation_scale [T, 1] f32; a row with a NaN or infinity has a scale
    that is none either, so the result shows it."""
    numbers = x.float()
    # NOTE(numerics): divided by a tensor, because CUDA multiplies by the reciprocal of a plain number.
    scale = numbers.abs().amax(dim=1, keepdim=True).clamp(min=MIN_AMAX) / numbers.new_full((), INT8_MAX)
    return (numbers / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def multiply_int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x: [T, K]`` int8, ``weight: [N, K]`` int8 -> x @ weight^T [T, N] int32, exact for K <= 133,144."""
    rows = [(weight.long() * row.long()).sum(dim=1) for row in x]
    return torch.stack(rows).int() if rows else x.new_empty(0, weight.shape[0], dtype=torch.int32)


def linear_w8a8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """``x: [T, K]``, ``weight: [N, K]`` int8, ``weight_scale: [N, 1]`` f32 -> [T, N] in x's dtype."""
    return linear_w8a8_quantized(*quantize_per_token(x), weight, weight_scale, x.dtype)


def linear_w8a8_quantized(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """``x: [T, K]`` int8, ``x_scale: [T, 1]`` f32, ``weight: [N, K]`` int8, ``weight_scale: [N, 1]`` f32 -> [T, N] in
    ``out_dtype``."""
    # NOTE(numerics): this order of the two products, each rounded to float32.
    return (multiply_int8(x, weight).float() * x_scale * weight_scale.t()).to(out_dtype)


def grouped_mlp_w8a8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """Every expert's gated MLP on its rows: ``x: [M, D]`` sorted by expert, counts [e] int32 -> [M, D] in x's dtype.

    ``gate_up_proj: [e, 2F, D]`` and ``down_proj: [e, D, F]`` int8, scales [e, 2F, 1] and [e, D, 1] f32. Rows behind the
    last expert's are spare: what comes out for them is unspecified.
    """
    matrices = gate_up_proj, gate_up_scale, down_proj, down_scale
    return grouped_mlp_w8a8_quantized(*quantize_per_token(x), *matrices, num_tokens_per_expert, x.dtype)


def grouped_mlp_w8a8_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``grouped_mlp_w8a8`` of rows that were quantised before they were sorted: ``x: [M, D]`` int8, ``x_scale: [M, 1]``
    f32 -> [M, D] in ``out_dtype``."""
    counts = num_tokens_per_expert.tolist()
    sizes = [*counts, x.shape[0] - sum(counts)]
    *parts, spare = x.split(sizes)
    weights = zip(parts, x_scale.split(sizes)[:-1], gate_up_proj, gate_up_scale, down_proj, down_scale, strict=True)
    outs = [_mlp_quantized(*expert, out_dtype) for expert in weights]
    return torch.cat([*outs, torch.zeros_like(spare, dtype=out_dtype)])


def grouped_mlp_w8a8_masked(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """As ``grouped_mlp_w8a8``, for rows with padding: ``x: [e, capacity, D]`` -> the same shape; what comes out for
    padding rows is unspecified."""
    out = torch.zeros_like(x)
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        weights = gate_up_proj[expert], gate_up_scale[expert], down_proj[expert], down_scale[expert]
        out[expert, :count] = _mlp(x[expert, :count], *weights)
    return out


def _mlp(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
) -> torch.Tensor:
    return _mlp_quantized(*quantize_per_token(x), gate_up_proj, gate_up_scale, down_proj, down_scale, x.dtype)


def _mlp_quantized(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    # NOTE(numerics): float32 up to the second quantisation, with no rounding to x's dtype between, so that one fused
    # kernel can do the same.
    hidden = silu_mul(linear_w8a8_quantized(x, x_scale, gate_up_proj, gate_up_scale, torch.float32))
    out = linear_w8a8_quantized(*quantize_per_token(hidden), down_proj, down_scale, torch.float32)
    return out.to(out_dtype)
