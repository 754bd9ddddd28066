"""W8A8 on NVIDIA cards: quantise a row, multiply on the integer tensor cores, scale; experts without a host sync.

Invariant: integer sums are exact and roundings are ``reference_w8a8.py``'s; silu alone has the card's own last bits.

Shape letters: see ``reference_w8a8.py``.
"""

import torch

from argosy.kernels import device_w8a8
from argosy.kernels.triton.quantize import quantize_per_token, quantize_real_rows
from argosy.kernels.triton.w8a8_few_rows import MAX_ROWS, w8a8_few_rows
from argosy.kernels.triton.w8a8_gemm import IN_FEATURES_MULTIPLE, w8a8_grouped_gemm


def linear_w8a8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8``."""
    return linear_w8a8_quantized(*quantize_per_token(x), weight, weight_scale, x.dtype)


def linear_w8a8_quantized(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8_quantized``; all are contiguous."""
    assert all(tensor.is_contiguous() for tensor in (x, x_scale, weight, weight_scale))
    if not _can_load(weight):
        return device_w8a8.linear_w8a8_quantized(x, x_scale, weight, weight_scale, out_dtype)
    if x.shape[0] <= MAX_ROWS:
        return w8a8_few_rows(x, x_scale, weight, weight_scale, out_dtype)
    return w8a8_grouped_gemm(x, x_scale, weight.unsqueeze(0), weight_scale.unsqueeze(0), None, out_dtype)


def grouped_mlp_w8a8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
    num_expected_rows: int | None = None,
) -> torch.Tensor:
    """See ``reference_w8a8.grouped_mlp_w8a8``. ``num_expected_rows``: see ``choice.grouped_mlp_w8a8``."""
    matrices = gate_up_proj, gate_up_scale, down_proj, down_scale
    rows = _quantize_rows(x, num_tokens_per_expert, num_expected_rows)
    return grouped_mlp_w8a8_quantized(*rows, *matrices, num_tokens_per_expert, x.dtype, num_expected_rows)


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
    """See ``reference_w8a8.grouped_mlp_w8a8_quantized``."""
    if not (_can_load(gate_up_proj) and _can_load(down_proj)):
        matrices = gate_up_proj, gate_up_scale, down_proj, down_scale
        return device_w8a8.grouped_mlp_w8a8_quantized(x, x_scale, *matrices, num_tokens_per_expert, out_dtype)
    hidden = w8a8_grouped_gemm(
        x,
        x_scale,
        gate_up_proj,
        gate_up_scale,
        num_tokens_per_expert,
        torch.float32,
        is_gated=True,
        num_expected_rows=num_expected_rows,
    )
    rows = _quantize_rows(hidden, num_tokens_per_expert, num_expected_rows)
    return w8a8_grouped_gemm(
        *rows, down_proj, down_scale, num_tokens_per_expert, out_dtype, num_expected_rows=num_expected_rows
    )


def grouped_mlp_w8a8_masked(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """See ``reference_w8a8.grouped_mlp_w8a8_masked``. Every expert's whole capacity is computed."""
    num_experts, capacity, hidden_size = x.shape
    counts = torch.full_like(num_tokens_per_expert, capacity)
    rows = x.reshape(num_experts * capacity, hidden_size)
    return grouped_mlp_w8a8(rows, gate_up_proj, gate_up_scale, down_proj, down_scale, counts).view(x.shape)


def _quantize_rows(
    x: torch.Tensor, num_tokens_per_expert: torch.Tensor, num_expected_rows: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if num_expected_rows is None:
        return quantize_per_token(x)
    return quantize_real_rows(x, num_tokens_per_expert, num_expected_rows)


def _can_load(weight: torch.Tensor) -> bool:
    return weight.shape[-1] % IN_FEATURES_MULTIPLE == 0
