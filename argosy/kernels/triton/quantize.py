"""Rows to INT8 with a scale each, in one pass. Invariant: bitwise what ``reference_w8a8.quantize_per_token`` gives.

``row_to_int8`` is the arithmetic, for kernels that have made a row and quantise it before it leaves the registers.

Shape letters: T rows, n numbers of a row, e experts.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.reference_w8a8 import MIN_AMAX
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Added to a float32 number below 2^22, it pushes the fraction out by the card's own rounding, half to even; what
# remains ends in the integer's own lowest byte.
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
# Bits of the largest number's magnitude: integers order as floats do, and a NaN is above infinity.
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)

# Numbers of a row for each warp: a thread has 16, 32 bytes of bfloat16. Measured on an H200 with this file's kernel; 64
# rows of 16,384 take 3.4 us, and in 16 warps 3.8.
WARP_NUMBERS = 512
MAX_WARPS = 32


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [T, n]``, rows may be strided -> int8 [T, n], scale [T, 1] f32."""
    num_rows, size = x.shape
    quantized, scale = allocate_int8(num_rows, size, x.device)
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
            num_warps=choose_num_warps(block),
            launch_pdl=IS_ON,
        )
    return quantized, scale


def quantize_real_rows(
    x: torch.Tensor, num_rows_per_expert: torch.Tensor, num_expected_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``quantize_per_token``, for the first sum(``num_rows_per_expert``) rows; the others are neither read nor
    written. ``num_rows_per_expert: [e]`` int32, read on the card; ``num_expected_rows``: about their sum, which decides
    how many programs share the rows and nothing else."""
    num_rows, size = x.shape
    quantized, scale = allocate_int8(num_rows, size, x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        num_experts = num_rows_per_expert.shape[0]
        _quantize_real_rows_kernel[(count_programs(num_rows, num_expected_rows),)](
            x,
            num_rows_per_expert,
            quantized,
            scale,
            size,
            x.stride(0),
            num_experts,
            NUM_EXPERTS=triton.next_power_of_2(num_experts),
            MIN_AMAX=MIN_AMAX,
            BLOCK=block,
            num_warps=choose_num_warps(block),
            launch_pdl=IS_ON,
        )
    return quantized, scale


def count_programs(num_items: int, num_expected_items: int) -> int:
    """One for each item that is expected: a program that finds nothing to do still costs its start."""
    return max(1, min(num_items, num_expected_items))


def allocate_int8(num_rows: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What quantised rows are written to: int8 [T, n], scale [T, 1] f32."""
    quantized = torch.empty(num_rows, size, dtype=torch.int8, device=device)
    return quantized, torch.empty(num_rows, 1, dtype=torch.float32, device=device)


def choose_num_warps(block: int, max_warps: int = MAX_WARPS) -> int:
    """For a program that holds a row of ``block`` numbers."""
    return min(max_warps, max(1, block // WARP_NUMBERS))


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
    let_next_start()
    wait_for_inputs()
    values = tl.load(x + row * row_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    numbers, step = row_to_int8(values, MIN_AMAX)
    tl.store(quantized + row * size + columns, numbers, mask=is_column)
    tl.store(scale + row, step)


@triton.jit
def _quantize_real_rows_kernel(
    x,
    counts,
    quantized,
    scale,
    size,
    row_stride,
    num_experts,
    NUM_EXPERTS: tl.constexpr,  # noqa: N803
    MIN_AMAX: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    columns = tl.arange(0, BLOCK)
    is_column = columns < size
    let_next_start()
    wait_for_inputs()
    num_real = sum_counts(counts, num_experts, NUM_EXPERTS)
    for row in tl.range(tl.program_id(0).to(tl.int64), num_real, tl.num_programs(0)):
        values = tl.load(x + row * row_stride + columns, mask=is_column, other=0.0).to(tl.float32)
        numbers, step = row_to_int8(values, MIN_AMAX)
        tl.store(quantized + row * size + columns, numbers, mask=is_column)
        tl.store(scale + row, step)


@triton.jit
def sum_counts(counts, num_experts, NUM_EXPERTS: tl.constexpr):  # noqa: N803
    """Rows of all experts: those behind are nobody's."""
    experts = tl.arange(0, NUM_EXPERTS)
    return tl.sum(tl.load(counts + experts, mask=experts < num_experts, other=0))


@triton.jit
def row_to_int8(values, MIN_AMAX: tl.constexpr):  # noqa: N803
    """float32 numbers of a row (others 0) -> int8, scale. A NaN or an infinity makes the scale one too."""
    amax = tl.maximum(find_amax(values, None), MIN_AMAX, propagate_nan=tl.PropagateNan.ALL)
    step = tl.div_rn(amax, 127.0)
    return round_to_int8(tl.div_rn(values, step)), step


@triton.jit
def find_amax(values, axis: tl.constexpr):
    """The largest magnitude of float32 numbers, NaN if there is one."""
    return tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, axis).to(tl.float32, bitcast=True)


@triton.jit
def round_to_int8(quotients):
    """Within +-127.5, half to even; what becomes of a NaN is unspecified."""
    return (quotients + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
