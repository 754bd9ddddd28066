"""Norms and the gated activation, with what stands before and behind them: residual sums and 8-bit rows, in one pass.

In plain torch each widening, sum, product, rounding and amax reads and writes memory; here a row is read once, kept in
registers by one program, and all that is made of it is written once. Invariant: a value is rounded to a tensor's dtype
wherever ``reference.py`` keeps it in one, so only a sum's order and silu's exponential have last bits of their own.

Shape letters: T rows, n numbers of a row, M rows of an MLP, F its width, e experts.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.reference_w8a8 import MIN_AMAX
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs
from argosy.kernels.triton.quantize import allocate_int8, choose_num_warps, count_programs, row_to_int8, sum_counts
from argosy.kernels.triton.quantize_groups import GROUP, empty_groups, quantize_last_dim

# Warps of a program that holds a whole row: quantize.py's rule, but wider at most. Not measured yet.
MAX_ROW_WARPS = 32
# silu_mul alone needs no whole row: numbers of one program, so that few rows keep many programs. Not measured yet.
SILU_BLOCK, SILU_WARPS = 1024, 4


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x: [T, n]``, ``weight: [n]`` f32 -> [T, n] in x's dtype, written to ``out`` (which may be x) if there is one.

    Rows of both may be strided.
    """
    normed = _empty_rows(x) if out is None else out
    if x.shape[0]:
        _launch_rms_norm(x, x, weight, eps, x, normed, normed, weight, has_delta=False, is_quantized=False)
    return normed


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x, delta: [T, n]``, rows may be strided, delta of any float -> rms_norm(total), total = x + delta: [T, n] in
    x's dtype."""
    normed, total = _empty_rows(x), _empty_rows(x)
    if x.shape[0]:
        _launch_rms_norm(x, delta, weight, eps, total, normed, normed, weight, has_delta=True, is_quantized=False)
    return normed, total


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x: [T, n]``, rows may be strided -> rms_norm(x) in x's dtype, and of these numbers int8 [T, n], scale [T, 1]
    f32."""
    normed = _empty_rows(x)
    quantized, scale = allocate_int8(*x.shape, x.device)
    if x.shape[0]:
        _launch_rms_norm(x, x, weight, eps, x, normed, quantized, scale, has_delta=False, is_quantized=True)
    return normed, quantized, scale


def add_rms_norm_quantize(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``add_rms_norm``, then as ``rms_norm_quantize`` -> normed, total, int8 [T, n], scale [T, 1] f32."""
    normed, total = _empty_rows(x), _empty_rows(x)
    quantized, scale = allocate_int8(*x.shape, x.device)
    if x.shape[0]:
        _launch_rms_norm(x, delta, weight, eps, total, normed, quantized, scale, has_delta=True, is_quantized=True)
    return normed, total, quantized, scale


def rms_norm_quantize_groups(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, *, has_ue8m0_scales: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rms_norm of ``x``, or ``add_rms_norm`` with ``delta``, then ``quantize_groups`` -> normed, total, e4m3 [T, n],
    scale [T, ceil(n / 128)] f32, a view whose columns are contiguous."""
    normed, total = _empty_rows(x), x if delta is None else _empty_rows(x)
    quantized, scale = empty_groups(*x.shape, x.device)
    if x.shape[0]:
        _launch_rms_norm(
            x,
            x if delta is None else delta,
            weight,
            eps,
            total,
            normed,
            quantized,
            scale,
            has_delta=delta is not None,
            is_grouped=True,
            has_ue8m0_scales=has_ue8m0_scales,
        )
    return normed, total, quantized, scale


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gate_up: [M, 2F]``, rows may be strided -> silu(gate) * up: [M, F]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    if num_rows:
        num_blocks = triton.cdiv(width, SILU_BLOCK)
        _silu_mul_kernel[(num_rows * num_blocks,)](
            gate_up,
            out,
            width,
            gate_up.stride(0),
            NUM_BLOCKS=num_blocks,
            BLOCK=SILU_BLOCK,
            num_warps=SILU_WARPS,
            launch_pdl=IS_ON,
        )
    return out


def silu_mul_real_rows(
    gate_up: torch.Tensor, num_rows_per_expert: torch.Tensor, num_expected_rows: int
) -> torch.Tensor:
    """As ``silu_mul``, for the first sum(``num_rows_per_expert``) rows; the others are neither read nor written.

    See ``quantize.quantize_real_rows``."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    if num_rows:
        num_blocks = triton.cdiv(width, SILU_BLOCK)
        num_experts = num_rows_per_expert.shape[0]
        _silu_mul_real_rows_kernel[(count_programs(num_rows, num_expected_rows) * num_blocks,)](
            gate_up,
            num_rows_per_expert,
            out,
            width,
            gate_up.stride(0),
            num_experts,
            NUM_EXPERTS=triton.next_power_of_2(num_experts),
            NUM_BLOCKS=num_blocks,
            BLOCK=SILU_BLOCK,
            num_warps=SILU_WARPS,
        )
    return out


def silu_mul_quantize(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``gate_up: [M, 2F]``, rows may be strided -> of silu_mul(gate_up), int8 [M, F], scale [M, 1] f32."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    quantized, scale = allocate_int8(num_rows, width, gate_up.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        _silu_mul_quantize_kernel[(num_rows,)](
            gate_up,
            quantized,
            scale,
            width,
            gate_up.stride(0),
            MIN_AMAX=MIN_AMAX,
            BLOCK=block,
            num_warps=choose_num_warps(block, MAX_ROW_WARPS),
            launch_pdl=IS_ON,
        )
    return quantized, scale


def _empty_rows(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)  # contiguous, though x's rows may be strided


def _launch_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    normed: torch.Tensor,
    quantized: torch.Tensor,
    scale: torch.Tensor,
    *,
    has_delta: bool,
    is_quantized: bool = False,
    is_grouped: bool = False,
    has_ue8m0_scales: bool = False,
) -> None:
    """What is not used is any tensor: a launch needs a pointer. ``is_grouped``: quantised, but in FP8 groups."""
    num_rows, size = x.shape
    block = max(triton.next_power_of_2(size), GROUP.value if is_grouped else 1)
    _rms_norm_kernel[(num_rows,)](
        x,
        delta,
        weight,
        total,
        normed,
        quantized,
        scale,
        num_rows,
        size,
        x.stride(0),
        delta.stride(0),
        normed.stride(0),
        eps,
        HAS_DELTA=has_delta,
        IS_QUANTIZED=is_quantized,
        IS_GROUPED=is_grouped,
        HAS_UE8M0_SCALES=has_ue8m0_scales,
        MIN_AMAX=MIN_AMAX,
        BLOCK=block,
        num_warps=choose_num_warps(block, MAX_ROW_WARPS),
        launch_pdl=IS_ON,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,
    delta,
    weight,
    total,
    normed,
    quantized,
    scale,
    num_rows,
    size,
    x_stride,
    delta_stride,
    normed_stride,
    eps,
    HAS_DELTA: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    IS_QUANTIZED: tl.constexpr,  # noqa: N803
    IS_GROUPED: tl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: tl.constexpr,  # noqa: N803
    MIN_AMAX: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    columns = row_columns(BLOCK)
    is_column = columns < size
    let_next_start()
    # Asked for before the row is there, so that both waits are one; the next row's program reads it again.
    factors = tl.load(weight + columns, mask=is_column, other=0.0, eviction_policy="evict_last")
    wait_for_inputs()
    values = tl.load(x + row * x_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        values += tl.load(delta + row * delta_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    if HAS_DELTA:
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * size + columns, rounded, mask=is_column)
        values = rounded.to(tl.float32)
    out = (rms_normalize(values, tl.sum(values * values), size, eps) * factors).to(normed.dtype.element_ty)
    tl.store(normed + row * normed_stride + columns, out, mask=is_column)
    if IS_QUANTIZED:
        numbers, step = row_to_int8(out.to(tl.float32), MIN_AMAX)
        tl.store(quantized + row * size + columns, numbers, mask=is_column)
        tl.store(scale + row, step)
    if IS_GROUPED:
        grouped = tl.reshape(out.to(tl.float32), (BLOCK // GROUP, GROUP))
        rounded, steps = quantize_last_dim(grouped, HAS_UE8M0_SCALES)
        numbers = tl.reshape(rounded, (BLOCK // 8, 8)).to(tl.float8e4nv)
        tl.store(quantized + row * size + columns, numbers, mask=is_column)
        groups = tl.arange(0, BLOCK // GROUP)
        steps = tl.reshape(steps, (BLOCK // GROUP,))
        tl.store(scale + groups.to(tl.int64) * num_rows + row, steps, mask=groups * GROUP < size)


@triton.jit
def _silu_mul_kernel(
    gate_up,
    out,
    width,
    row_stride,
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + row_columns(BLOCK)
    is_column = columns < width
    value = _silu_mul_row(gate_up + row * row_stride, columns, is_column, width)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _silu_mul_real_rows_kernel(
    gate_up,
    counts,
    out,
    width,
    row_stride,
    num_experts,
    NUM_EXPERTS: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    columns = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + row_columns(BLOCK)
    is_column = columns < width
    num_real = sum_counts(counts, num_experts, NUM_EXPERTS)
    first = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    for row in tl.range(first, num_real, tl.num_programs(0) // NUM_BLOCKS):
        value = _silu_mul_row(gate_up + row * row_stride, columns, is_column, width)
        tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _silu_mul_quantize_kernel(
    gate_up,
    quantized,
    scale,
    width,
    row_stride,
    MIN_AMAX: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    columns = row_columns(BLOCK)
    is_column = columns < width
    let_next_start()
    wait_for_inputs()
    value = _silu_mul_row(gate_up + row * row_stride, columns, is_column, width)
    # NOTE(numerics): the specification keeps the product in gate_up's dtype before it quantises.
    numbers, step = row_to_int8(value.to(gate_up.dtype.element_ty).to(tl.float32), MIN_AMAX)
    tl.store(quantized + row * width + columns, numbers, mask=is_column)
    tl.store(scale + row, step)


@triton.jit
def row_columns(BLOCK: tl.constexpr):  # noqa: N803
    """0 .. BLOCK - 1 in eights, 16 bytes of bfloat16: a thread has the same numbers of every tensor of a row, also of
    INT8 ones, of which it would otherwise take 16, and nothing moves between threads."""
    return tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _silu_mul_row(gate_up_row, columns, is_column, width):
    gate = tl.load(gate_up_row + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_row + width + columns, mask=is_column, other=0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def rms_normalize(values, sum_of_squares, size, eps):
    """float32 numbers of a row -> the same without weight."""
    return values * tl.rsqrt(sum_of_squares / size + eps)


@triton.jit
def layer_normalize(values, is_column, size, eps):
    """float32 numbers of a row (others 0) -> the same without weight and bias."""
    centered = tl.where(is_column, values - tl.sum(values) / size, 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered) / size + eps)
