"""The indexer's queries in 8 bits, as its encoded keys are: turned by Hadamard's matrix, and rounded.

Invariant: bit for bit what ``reference_cache_rows`` makes of a query.

Shape letters: B requests, T tokens of each, J index heads, I index_head_dim.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.reference_cache_rows import MIN_AMAX, NumberFormat
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs
from argosy.kernels.triton.quantize import ROUNDER

QUANTIZED_ROWS = 128  # queries that one program rotates
# x plus its power of two times FP8_ROUNDER, minus that again, is x with e4m3's 3 bits behind the first.
FP8_MIN_NORMAL: tl.constexpr = tl.constexpr(2.0**-6)
FP8_ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2.0**20)


def quantize_queries(
    index_q: torch.Tensor, index_weights: torch.Tensor, hadamard: torch.Tensor, numbers: NumberFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """``index_q: [B, T, J, I]``, ``index_weights: [B, T, J]`` f32 -> numbers [B, T, J, I], and the weights times their
    scales: [B, T, J] f32."""
    query = torch.empty(index_q.shape, dtype=numbers.dtype, device=index_q.device)
    weights = torch.empty(index_weights.shape, dtype=torch.float32, device=index_q.device)
    num_rows = weights.numel()
    if num_rows:
        _quantize_queries_kernel[(triton.cdiv(num_rows, QUANTIZED_ROWS),)](
            index_q.contiguous(),
            index_weights.contiguous(),
            hadamard,
            query,
            weights,
            num_rows,
            MIN_AMAX=MIN_AMAX,
            MAX_VALUE=numbers.max_value,
            IS_INTEGER=not numbers.dtype.is_floating_point,
            DIM=index_q.shape[3],
            BLOCK_ROWS=QUANTIZED_ROWS,
            num_warps=8,
            launch_pdl=IS_ON,
        )
    return query, weights


@triton.jit
def _quantize_queries_kernel(
    index_q,
    index_weights,
    hadamard,
    query,
    weights,
    num_rows,
    MIN_AMAX: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    MAX_VALUE: tl.constexpr,  # noqa: N803
    IS_INTEGER: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, DIM)
    is_row = rows < num_rows
    places = rows[:, None].to(tl.int64) * DIM + columns[None, :]
    x = tl.load(index_q + places, mask=is_row[:, None], other=0.0)
    # NOTE(numerics): with +-1 the products are exact in every float dtype; the magnitude comes in once, at the end.
    magnitude = tl.load(hadamard)
    turns = tl.load(hadamard + columns[:, None] * DIM + columns[None, :])
    signs = tl.where(turns > 0, 1.0, -1.0).to(x.dtype)
    rotated = tl.dot(x, signs, input_precision="ieee") * magnitude
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(rotated), axis=1), MIN_AMAX), MAX_VALUE)
    units = tl.div_rn(rotated, tl.broadcast_to(scale[:, None], (BLOCK_ROWS, DIM)))
    units = tl.minimum(tl.maximum(units, -MAX_VALUE), MAX_VALUE)
    if IS_INTEGER:
        units = (units + ROUNDER) - ROUNDER
    else:  # so that the cast, which differs by platform, has nothing to round
        power = tl.maximum((units.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), FP8_MIN_NORMAL)
        rounder = power * FP8_ROUNDER
        units = (units + rounder) - rounder
    tl.store(query + places, units.to(query.dtype.element_ty), mask=is_row[:, None])
    weight = tl.load(index_weights + rows, mask=is_row, other=0.0)
    tl.store(weights + rows, weight * scale, mask=is_row)
