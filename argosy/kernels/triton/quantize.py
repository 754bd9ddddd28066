"""Rows to INT8 with a scale each, in one pass. Invariant: bitwise what ``reference_w8a8.quantize_per_token`` gives.

Shape letters: T rows, n numbers of a row.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.reference_w8a8 import MIN_AMAX

# float32 numbers below 2^22 lose their fraction when this is added, by the card's own rounding: half to even.
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [T, n]``, rows may be strided -> int8 [T, n], scale [T, 1] f32."""
    num_rows, size = x.shape
    quantized = torch.empty(num_rows, size, dtype=torch.int8, device=x.device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        _quantize_kernel[(num_rows,)](
            x,
            quantized,
            scale,
            size,
            x.stride(0),
            MIN_AMAX=MIN_AMAX,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return quantized, scale


@triton.jit
def _quantize_kernel(
    x,
    quantized,
    scale,
    size,
    row_stride,
    MIN_AMAX: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < size
    values = tl.load(x + row * row_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(values)), MIN_AMAX)
    step = tl.div_rn(amax, 127.0)
    rounded = (tl.div_rn(values, step) + ROUNDER) - ROUNDER
    clamped = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    tl.store(quantized + row * size + columns, clamped.to(tl.int8), mask=is_column)
    tl.store(scale + row, step)
