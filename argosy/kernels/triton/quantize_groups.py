"""Rows to e4m3 with a scale per 128 numbers, in one pass; with silu before it, where gate and up come unmultiplied.

Scales are stored group after group, as the products read them: what is returned is a transposed view. Invariant:
bitwise what ``reference_fp8.quantize_groups`` gives; silu alone has the card's own last bits.

Shape letters: T rows, K numbers of a row, G = ceil(K / 128) groups, e experts.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.reference_fp8 import BLOCK_SIZE, FP8_MAX, MIN_AMAX
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs
from argosy.kernels.triton.quantize import count_programs, sum_counts

GROUP: tl.constexpr = tl.constexpr(BLOCK_SIZE)
LARGEST: tl.constexpr = tl.constexpr(FP8_MAX)
SMALLEST_AMAX: tl.constexpr = tl.constexpr(MIN_AMAX)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-6)  # of e4m3; below it steps are equal
ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2**20)  # times 2^e: float32 numbers there have e4m3's steps at 2^e
EXPONENT_BITS: tl.constexpr = tl.constexpr(0x7F800000)
FRACTION_BITS: tl.constexpr = tl.constexpr(0x007FFFFF)

BLOCK_GROUPS = 8  # of a row that a program takes: 1,024 numbers
MANY_ROWS = 1024  # from here on a program takes several rows


def quantize_groups(x: torch.Tensor, *, has_ue8m0_scales: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """``x: [T, K]``, rows may be strided -> e4m3 [T, K], scale [T, G] f32, a view whose columns are contiguous."""
    return _quantize(x, x.shape[1], has_ue8m0_scales, is_gated=False)


def quantize_real_groups(
    x: torch.Tensor, num_rows_per_expert: torch.Tensor, num_expected_rows: int, *, has_ue8m0_scales: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``quantize_groups``, for the first sum(``num_rows_per_expert``) rows; the others are neither read nor written.

    See ``quantize.quantize_real_rows``."""
    num_rows, size = x.shape
    quantized, scale = empty_groups(num_rows, size, x.device)
    if num_rows:
        num_experts = num_rows_per_expert.shape[0]
        block_rows = choose_block_rows(num_expected_rows)
        num_row_blocks = triton.cdiv(num_rows, block_rows)
        num_expected_blocks = triton.cdiv(num_expected_rows, block_rows)
        grid = (count_programs(num_row_blocks, num_expected_blocks), triton.cdiv(size, BLOCK_GROUPS * BLOCK_SIZE))
        _quantize_real_groups_kernel[grid](
            x,
            num_rows_per_expert,
            quantized,
            scale,
            num_rows,
            size,
            x.stride(0),
            num_experts,
            NUM_EXPERTS=triton.next_power_of_2(num_experts),
            HAS_UE8M0_SCALES=has_ue8m0_scales,
            BLOCK_ROWS=block_rows,
            BLOCK_GROUPS=BLOCK_GROUPS,
            num_warps=4,
        )
    return quantized, scale


def choose_block_rows(num_rows: int) -> int:
    return 4 if num_rows >= MANY_ROWS else 1


def silu_mul_quantize_groups(
    gate_up: torch.Tensor, *, has_ue8m0_scales: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gate_up: [T, 2K]``, gate first -> silu(gate) * up, rounded to gate_up's dtype, as ``quantize_groups`` does."""
    return _quantize(gate_up, gate_up.shape[1] // 2, has_ue8m0_scales, is_gated=True)


def empty_groups(num_rows: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where [num_rows, size] numbers and their scales go."""
    quantized = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(triton.cdiv(size, BLOCK_SIZE), num_rows, dtype=torch.float32, device=device)
    return quantized, scale.t()


@triton.jit
def quantize_last_dim(values, HAS_UE8M0_SCALES: tl.constexpr):  # noqa: N803 - Triton's compile-time constants
    """``values: [..., 128]`` f32 -> e4m3's numbers, still f32, and the scale [..., 1]."""
    amax = tl.max(tl.abs(values), axis=len(values.shape) - 1, keep_dims=True)
    scale = tl.div_rn(tl.maximum(amax, SMALLEST_AMAX), LARGEST)
    if HAS_UE8M0_SCALES:  # up to the next power of two
        bits = (scale.to(tl.int32, bitcast=True) + FRACTION_BITS) & EXPONENT_BITS
        scale = bits.to(tl.float32, bitcast=True)
    quotient = tl.clamp(tl.div_rn(values, scale), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    # NOTE(numerics): rounded here, half to even, so that the cast is exact: the interpreter's does not round.
    power = (quotient.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True)
    rounder = tl.maximum(power, SMALLEST_NORMAL) * ROUNDER
    return (quotient + rounder) - rounder, scale


def _quantize(
    x: torch.Tensor, size: int, has_ue8m0_scales: bool, *, is_gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = x.shape[0]
    quantized, scale = empty_groups(num_rows, size, x.device)
    block_rows = choose_block_rows(num_rows)
    if num_rows:
        grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(size, BLOCK_GROUPS * BLOCK_SIZE))
        _quantize_groups_kernel[grid](
            x,
            quantized,
            scale,
            num_rows,
            size,
            x.stride(0),
            IS_GATED=is_gated,
            HAS_UE8M0_SCALES=has_ue8m0_scales,
            BLOCK_ROWS=block_rows,
            BLOCK_GROUPS=BLOCK_GROUPS,
            num_warps=4,
            launch_pdl=IS_ON,
        )
    return quantized, scale


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_groups_kernel(
    x,
    quantized,
    scale,
    num_rows,
    size,
    row_stride,
    IS_GATED: tl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_GROUPS: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    _quantize_rows(
        x, quantized, scale, tl.program_id(0), num_rows, num_rows, size, row_stride, IS_GATED, HAS_UE8M0_SCALES,
        BLOCK_ROWS, BLOCK_GROUPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_real_groups_kernel(
    x,
    counts,
    quantized,
    scale,
    num_rows,
    size,
    row_stride,
    num_experts,
    NUM_EXPERTS: tl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_GROUPS: tl.constexpr,  # noqa: N803
):
    num_real = sum_counts(counts, num_experts, NUM_EXPERTS)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_real, BLOCK_ROWS), tl.num_programs(0)):
        _quantize_rows(
            x, quantized, scale, block, num_real, num_rows, size, row_stride, False, HAS_UE8M0_SCALES,
            BLOCK_ROWS, BLOCK_GROUPS,
        )  # fmt: skip


@triton.jit
def _quantize_rows(
    x,
    quantized,
    scale,
    block,
    stop_row,
    num_rows,
    size,
    row_stride,
    IS_GATED: tl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_GROUPS: tl.constexpr,  # noqa: N803
):
    """Rows ``block * BLOCK_ROWS`` and on, before ``stop_row``; the program's columns. ``num_rows``: of the tensors."""
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_GROUPS * GROUP + tl.arange(0, BLOCK_GROUPS * GROUP)
    is_here = (rows < stop_row)[:, None] & (columns < size)[None, :]
    places = x + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    values = tl.load(places, mask=is_here, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(places + size, mask=is_here, other=0.0).to(tl.float32)
        values = (values * tl.sigmoid(values) * up).to(x.dtype.element_ty).to(tl.float32)
    groups = tl.reshape(values, (BLOCK_ROWS, BLOCK_GROUPS, GROUP))
    rounded, group_scale = quantize_last_dim(groups, HAS_UE8M0_SCALES)
    numbers = tl.reshape(rounded, (BLOCK_ROWS, BLOCK_GROUPS * GROUP)).to(tl.float8e4nv)
    tl.store(quantized + rows[:, None].to(tl.int64) * size + columns[None, :], numbers, mask=is_here)
    group_ids = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    is_group = (rows < stop_row)[:, None] & (group_ids * GROUP < size)[None, :]
    scale_places = scale + group_ids[None, :].to(tl.int64) * num_rows + rows[:, None]
    tl.store(scale_places, tl.reshape(group_scale, (BLOCK_ROWS, BLOCK_GROUPS)), mask=is_group)
