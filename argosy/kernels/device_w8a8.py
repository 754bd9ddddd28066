"""W8A8 by ``torch._int_mm``, which runs on integer units of CPUs and of NVIDIA cards alike.

What accelerators run until they have kernels of their own; ``cpu_w8a8.py`` does the same with fewer calls. Invariant:
each function gives bit for bit what its twin in ``reference_w8a8.py`` gives.

Shape letters: see ``reference_w8a8.py``.
"""

import torch
import torch.nn.functional as F

from argosy.kernels.reference import silu_mul
from argosy.kernels.reference_w8a8 import quantize_per_token

# CUDA's _int_mm wants more than 16 rows, and the other sizes divisible by 8.
_MIN_ROWS = 32
_SIZE_MULTIPLE = 8


def multiply_int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x: [T, K]`` int8, ``weight: [N, K]`` int8 -> x @ weight^T [T, N] int32."""
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    spare_rows = max(_MIN_ROWS - num_rows, 0)
    spare_inputs, spare_outputs = -x.shape[1] % _SIZE_MULTIPLE, -num_outputs % _SIZE_MULTIPLE
    if spare_rows or spare_inputs:
        x = F.pad(x, (0, spare_inputs, 0, spare_rows))
    if spare_inputs or spare_outputs:  # no published size
        weight = F.pad(weight, (0, spare_inputs, 0, spare_outputs))
    return torch._int_mm(x, weight.t())[:num_rows, :num_outputs]


def linear_w8a8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8``."""
    return linear_w8a8_quantized(*quantize_per_token(x), weight, weight_scale, x.dtype)


def linear_w8a8_quantized(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8_quantized``."""
    return torch.mul(multiply_int8(x, weight), x_scale).mul_(weight_scale.t()).to(out_dtype)


def grouped_mlp_w8a8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """One expert after another. NOTE(sync): reads the counts on the host, because a view's size must be known there."""
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
    """See ``reference_w8a8.grouped_mlp_w8a8_quantized``. NOTE(sync): as ``grouped_mlp_w8a8``."""
    out = torch.empty_like(x, dtype=out_dtype)
    end = 0
    for expert, count in enumerate(num_tokens_per_expert.tolist()):
        start, end = end, end + count
        weights = gate_up_proj[expert], gate_up_scale[expert], down_proj[expert], down_scale[expert]
        if count:
            out[start:end] = _mlp_quantized(x[start:end], x_scale[start:end], *weights, out_dtype)
    return out


def grouped_mlp_w8a8_masked(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """Every expert's whole capacity: nothing waits for a count."""
    experts = zip(x, gate_up_proj, gate_up_scale, down_proj, down_scale, strict=True)
    return torch.stack([_mlp(*expert) for expert in experts])


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
    hidden = silu_mul(linear_w8a8_quantized(x, x_scale, gate_up_proj, gate_up_scale, torch.float32))
    out = linear_w8a8_quantized(*quantize_per_token(hidden), down_proj, down_scale, torch.float32)
    return out.to(out_dtype)
