"""W8A8 on a CPU: ``torch._int_mm`` in pieces that stay in the cache, and few calls where there are few rows.

Weights stay [N, K] with K contiguous, whose transposed view ``_int_mm`` reads faster than a transposed copy
(``docs/log.md``, 2026-11-22). Invariant: each function gives bit for bit what its twin in ``reference_w8a8.py`` gives.

Shape letters: see ``reference_w8a8.py``.
"""

from dataclasses import dataclass

import numpy as np
import torch

from argosy.kernels.reference import silu_mul
from argosy.kernels.reference_w8a8 import INT8_MAX, MIN_AMAX

_PIECE_SIZE = 2**18  # numbers of int32 or float32 that are worked on at a time: half of a core's second-level cache
_MIN_PIECE_COLUMNS = 256  # narrower products are slower


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference_w8a8.quantize_per_token``.

    NOTE(numerics): there is no clamp, because there is nothing to clamp: |x| / (amax / 127) exceeds 127 by less than
    three float32 roundings, and that rounds to 127.
    """
    if x.numel() <= _PIECE_SIZE // 4:
        return _quantize_few(x)
    quantized = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(x.shape[0], 1)
    step = max(1, _PIECE_SIZE // 4 // x.shape[1])
    for part, target, part_scale in zip(x.split(step), quantized.split(step), scale.split(step), strict=True):
        amax = torch.maximum(part.amax(dim=1, keepdim=True), part.amin(dim=1, keepdim=True).neg_())
        part_scale.copy_(amax).clamp_(min=MIN_AMAX).div_(INT8_MAX)
        target.copy_(torch.div(part, part_scale).round_())
    return quantized, scale


def linear_w8a8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8``."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return linear_w8a8_quantized(*quantize_per_token(x), weight, weight_scale, x.dtype)


def linear_w8a8_quantized(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """See ``reference_w8a8.linear_w8a8_quantized``."""
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    if 0 < num_rows * num_outputs <= _PIECE_SIZE:
        return torch.mul(torch._int_mm(x, weight.t()), x_scale).mul_(weight_scale.t()).to(out_dtype)
    out = torch.empty(num_rows, num_outputs, dtype=out_dtype)
    if num_rows:
        _multiply_in_pieces(x, x_scale, weight, weight_scale, out)
    return out


def grouped_mlp_w8a8(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """One product per busy expert; all rows are quantised and scaled together."""
    out = torch.empty_like(x)
    groups = _group_rows(num_tokens_per_expert.numpy())
    if groups.num_rows:
        gate_up = _grouped_linear(x[: groups.num_rows], gate_up_proj, gate_up_scale, groups)
        out[: groups.num_rows] = _grouped_linear(silu_mul(gate_up), down_proj, down_scale, groups)
    return out


def grouped_mlp_w8a8_masked(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_proj: torch.Tensor,
    down_scale: torch.Tensor,
    num_tokens_per_expert: torch.Tensor,
) -> torch.Tensor:
    """The real rows, sorted; padding is not computed."""
    num_experts, capacity, hidden_size = x.shape
    counts = num_tokens_per_expert.numpy()
    # Row r of expert i lies at i * capacity + r: its number among the real rows, plus the padding before it.
    padding_before = np.arange(num_experts) * capacity - (counts.cumsum() - counts)
    place = torch.from_numpy(np.arange(int(counts.sum())) + padding_before.repeat(counts))
    rows = x.reshape(num_experts * capacity, hidden_size).index_select(0, place)
    computed = grouped_mlp_w8a8(rows, gate_up_proj, gate_up_scale, down_proj, down_scale, num_tokens_per_expert)
    out = torch.empty(num_experts * capacity, hidden_size, dtype=x.dtype).index_copy_(0, place, computed)
    return out.view(num_experts, capacity, hidden_size)


@dataclass(frozen=True, slots=True)
class _RowGroups:
    """Sorted rows of the experts that have any."""

    experts: list[int]
    counts: list[int]
    num_rows: int
    expert_of_row: torch.Tensor  # [num_rows] int64


def _group_rows(counts: np.ndarray) -> _RowGroups:
    busy = np.flatnonzero(counts)
    busy_counts = counts[busy]
    expert_of_row = torch.from_numpy(busy.repeat(busy_counts))
    return _RowGroups(busy.tolist(), busy_counts.tolist(), len(expert_of_row), expert_of_row)


def _grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, groups: _RowGroups
) -> torch.Tensor:
    """``x: [num_rows, K]``, ``weight: [e, N, K]``, ``weight_scale: [e, N, 1]`` -> [num_rows, N] float32."""
    quantized, activation_scale = quantize_per_token(x)
    if x.shape[0] * weight.shape[1] <= _PIECE_SIZE:
        products = torch.empty(x.shape[0], weight.shape[1], dtype=torch.int32)
        parts = zip(groups.experts, quantized.split(groups.counts), products.split(groups.counts), strict=True)
        for expert, part, target in parts:
            torch._int_mm(part, weight[expert].t(), out=target)
        return torch.mul(products, activation_scale).mul_(weight_scale.squeeze(2)[groups.expert_of_row])
    out = torch.empty(x.shape[0], weight.shape[1])
    end = 0
    for expert, count in zip(groups.experts, groups.counts, strict=True):
        rows = slice(end, end + count)
        _multiply_in_pieces(quantized[rows], activation_scale[rows], weight[expert], weight_scale[expert], out[rows])
        end += count
    return out


def _multiply_in_pieces(
    quantized: torch.Tensor,
    activation_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """``out: [T, N]``, any float dtype, gets the scaled product, so many columns at a time that they stay cached."""
    step = max(_MIN_PIECE_COLUMNS, _PIECE_SIZE // quantized.shape[0])
    pieces = zip(weight.split(step), weight_scale.split(step), out.split(step, dim=1), strict=True)
    for part, part_scale, target in pieces:
        products = torch._int_mm(quantized, part.t())
        target.copy_(torch.mul(products, activation_scale).mul_(part_scale.t()))


def _quantize_few(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Through numpy, whose calls cost less."""
    numbers = x.float().numpy()
    scale = np.abs(numbers).max(axis=1, keepdims=True)
    np.maximum(scale, np.float32(MIN_AMAX), out=scale)
    scale /= np.float32(INT8_MAX)
    quantized = np.empty(numbers.shape, np.int8)
    np.rint(numbers / scale, out=quantized, casting="unsafe")
    return torch.from_numpy(quantized), torch.from_numpy(scale)
