"""The product of ``fp8_gemm.py`` for many rows, written out by hand for Hopper cards.

Two warp groups walk the tiles of ``hopper_tiles.py``. A block's products are made a quarter of the tile's columns at a
time: while a group scales and adds one quarter's sums in ordinary float32 units, the tensor cores have its next one, or
the other group's. Sums of two quarters are all that its registers hold beside the totals. Scales are asked for a block
of K ahead. Invariant: every output is the sum, in order, of its blocks' sums times scales.

Shape letters: those of ``fp8_gemm.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from argosy.kernels.triton.hopper_tiles import (
    GROUP_ROWS,
    NUM_GROUPS,
    REGISTERS,
    await_lead,
    await_step,
    copy_blocks,
    find_first_tile,
    find_next_tile,
    find_round,
    follow_blocks,
    lay_out_stores,
    open_ring,
)

HALF = gl.constexpr(128)  # of a tile: columns that share their scales
QUARTER = gl.constexpr(64)
LOG2_E = gl.constexpr(1.4426950408889634)
LARGEST = gl.constexpr(448.0)
SMALLEST_AMAX = gl.constexpr(1e-4)
EXPONENT_BITS = gl.constexpr(0x7F800000)
FRACTION_BITS = gl.constexpr(0x007FFFFF)
ONE_SQUARED_BITS = gl.constexpr(0x7F000000)  # without a power of two's bits: its reciprocal's


@gluon.jit(do_not_specialize=["num_rows", "x_scale_group_stride"])
def multiply_fp8_on_hopper(
    x_tiles,
    weight_tiles,
    x_scale,
    weight_scale_inv,
    counts,
    num_taken,
    out,
    out_scale,
    num_rows,
    num_experts,
    num_columns,
    out_features,
    in_features,
    x_scale_row_stride,
    x_scale_group_stride,
    WALKED_TILES: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    NUM_STAGES: gl.constexpr,  # noqa: N803
    LEAD: gl.constexpr,  # noqa: N803
    HAS_QUEUE: gl.constexpr,  # noqa: N803
    IS_GATED: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
    IS_QUANTIZED: gl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: gl.constexpr,  # noqa: N803
    HIDDEN_DTYPE: gl.constexpr,  # noqa: N803
):
    buffers, queue = open_ring(x_tiles, weight_tiles, num_taken, NUM_STAGES)
    walk = (counts, num_rows, num_experts, num_columns)
    sizes = (out_features, in_features)
    scales = (x_scale, weight_scale_inv, x_scale_row_stride, x_scale_group_stride)
    results = (out, out_scale)
    # Tuples that have a name lose their constants, so these are written out.
    gl.warp_specialize(
        # fmt: off
        [
            (
                _multiply,
                (
                    0,
                    scales,
                    results,
                    buffers,
                    queue,
                    walk,
                    sizes,
                    WALKED_TILES,
                    NUM_STAGES,
                    LEAD,
                    HAS_QUEUE,
                    IS_GATED,
                    IS_DENSE,
                    IS_QUANTIZED,
                    HAS_UE8M0_SCALES,
                    HIDDEN_DTYPE,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    scales,
                    results,
                    buffers,
                    queue,
                    walk,
                    sizes,
                    WALKED_TILES,
                    NUM_STAGES,
                    LEAD,
                    HAS_QUEUE,
                    IS_GATED,
                    IS_DENSE,
                    IS_QUANTIZED,
                    HAS_UE8M0_SCALES,
                    HIDDEN_DTYPE,
                ),
            ),
            (
                copy_blocks,
                (
                    x_tiles,
                    weight_tiles,
                    buffers,
                    queue,
                    walk,
                    sizes,
                    WALKED_TILES,
                    NUM_STAGES,
                    HAS_QUEUE,
                    IS_GATED,
                    IS_DENSE,
                ),
            ),
        ],
        # fmt: on
        [4, 1],
        REGISTERS,
    )


@gluon.jit
def _multiply(
    group: gl.constexpr,
    scales,
    results,
    buffers,
    queue,
    walk,
    sizes,
    WALKED_TILES: gl.constexpr,  # noqa: N803
    NUM_STAGES: gl.constexpr,  # noqa: N803
    LEAD: gl.constexpr,  # noqa: N803
    HAS_QUEUE: gl.constexpr,  # noqa: N803
    IS_GATED: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
    IS_QUANTIZED: gl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: gl.constexpr,  # noqa: N803
    HIDDEN_DTYPE: gl.constexpr,  # noqa: N803
):
    rows, weights, full, empty = buffers
    counts, num_rows, num_experts, num_columns = walk
    out_features, in_features = sizes
    BLOCK_K: gl.constexpr = weights.shape[2]  # noqa: N806
    TILE_N: gl.constexpr = HALF if IS_GATED else 2 * HALF  # noqa: N806
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUARTER, 32])  # noqa: N806
    num_blocks = gl.maximum((in_features + BLOCK_K - 1) // BLOCK_K, 1)
    block = 0
    turn = 0
    tile = find_first_tile(walk, TILE_N, WALKED_TILES, IS_DENSE)
    while tile[0] < num_experts:
        expert, place, first_row, count, tile_row, column = tile
        row = tile_row + group * GROUP_ROWS
        if row < count:
            places = _find_scales(scales, walk, sizes, expert, first_row + row, column, num_blocks, IS_GATED, SUMS)
            row_scale, left_scale, right_scale = _load_scales(places, scales, 0)
            await_lead(group, block, num_blocks, buffers, NUM_STAGES, LEAD)
            nothing = gl.zeros([GROUP_ROWS, QUARTER], gl.float32, layout=SUMS)
            total_0, total_1, total_2, total_3 = nothing, nothing, nothing, nothing
            even, odd = nothing, nothing
            for number in range(num_blocks):
                next_scales = _load_scales(places, scales, gl.minimum(number + 1, num_blocks - 1))
                left = gl.expand_dims(row_scale * left_scale, 1)
                right = gl.expand_dims(row_scale * right_scale, 1)
                stage = (block + number) % NUM_STAGES
                mbarrier.wait(full.index(stage), find_round(block + number, NUM_STAGES))
                block_rows = rows.index(stage * NUM_GROUPS + group)
                box = weights.index(stage)
                even = _multiply_quarter(block_rows, box, 0, even)
                odd = _multiply_quarter(block_rows, box, 1, odd)
                even = warpgroup_mma_wait(1, deps=(even,))
                total_0 = total_0 + even * left
                even = _multiply_quarter(block_rows, box, 2, even)
                odd = warpgroup_mma_wait(1, deps=(odd,))
                total_1 = total_1 + odd * left
                odd = _multiply_quarter(block_rows, box, 3, odd)
                even = warpgroup_mma_wait(1, deps=(even,))
                total_2 = total_2 + even * right
                odd = warpgroup_mma_wait(0, deps=(odd,))
                mbarrier.arrive(empty.index(stage * NUM_GROUPS + group))
                total_3 = total_3 + odd * right
                row_scale, left_scale, right_scale = next_scales
            if IS_GATED:
                total_0 = _gate(total_0, total_2, HIDDEN_DTYPE)
                total_1 = _gate(total_1, total_3, HIDDEN_DTYPE)
            if IS_QUANTIZED:
                scale, factor = _find_group_scale(total_0, total_1, HAS_UE8M0_SCALES)
                _store_scale(scale, results, row, first_row, count, column, num_rows, SUMS)
                total_0 = _quantize(total_0, scale, factor, HAS_UE8M0_SCALES)
            _store(total_0, results, row, first_row, count, column, num_columns)
            if IS_QUANTIZED:
                total_1 = _quantize(total_1, scale, factor, HAS_UE8M0_SCALES)
            _store(total_1, results, row, first_row, count, column + QUARTER, num_columns)
            if not IS_GATED:
                _store(total_2, results, row, first_row, count, column + HALF, num_columns)
                _store(total_3, results, row, first_row, count, column + HALF + QUARTER, num_columns)
        else:
            follow_blocks(group, block, num_blocks, buffers, NUM_STAGES)
        step = await_step(queue, turn, NUM_STAGES, HAS_QUEUE)
        tile = find_next_tile(tile, step, walk, TILE_N, WALKED_TILES, IS_DENSE)
        block += num_blocks
        turn += 1


@gluon.jit
def _multiply_quarter(block_rows, box, quarter: gl.constexpr, sums):
    """Starts it. The sums before are written over: so the compiler takes their registers, and no others."""
    columns = box.slice(quarter * QUARTER, QUARTER).permute((1, 0))
    return warpgroup_mma(block_rows, columns, sums, use_acc=False, is_async=True)


@gluon.jit
def _find_scales(
    scales,
    walk,
    sizes,
    expert,
    row,
    column,
    num_blocks,
    IS_GATED: gl.constexpr,  # noqa: N803
    SUMS: gl.constexpr,  # noqa: N803
):
    """Pointers to the first block's: of the rows from ``row`` on, of the left half's weights and of the right's."""
    x_scale, weight_scale_inv, row_stride, group_stride = scales
    counts, num_rows, num_experts, num_columns = walk
    out_features, in_features = sizes
    scale_rows = (out_features + HALF - 1) // HALF
    left_row = column // HALF
    right_row = gl.minimum(left_row + (num_columns // HALF if IS_GATED else 1), scale_rows - 1)
    row_ids = gl.minimum(row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS)), num_rows - 1)
    row_scales = x_scale + row_ids * row_stride
    left_scales = weight_scale_inv + (expert * scale_rows + left_row) * num_blocks
    return row_scales, left_scales, weight_scale_inv + (expert * scale_rows + right_row) * num_blocks


@gluon.jit
def _load_scales(places, scales, block):
    row_scales, left_scales, right_scales = places
    x_scale, weight_scale_inv, row_stride, group_stride = scales
    return gl.load(row_scales + block * group_stride), gl.load(left_scales + block), gl.load(right_scales + block)


@gluon.jit
def _gate(gate, up, HIDDEN_DTYPE: gl.constexpr):  # noqa: N803
    gate = gate.to(HIDDEN_DTYPE).to(gl.float32)
    up = up.to(HIDDEN_DTYPE).to(gl.float32)
    return (gate / (1.0 + gl.exp2(gate * -LOG2_E)) * up).to(HIDDEN_DTYPE).to(gl.float32)


@gluon.jit
def _find_group_scale(left, right, HAS_UE8M0_SCALES: gl.constexpr):  # noqa: N803
    """As ``quantize_groups.quantize_last_dim`` of both together: the scale, and its reciprocal."""
    amax = gl.maximum(gl.max(gl.abs(left), axis=1), gl.max(gl.abs(right), axis=1))
    scale = gl.div_rn(gl.maximum(amax, SMALLEST_AMAX), LARGEST)
    if HAS_UE8M0_SCALES:  # up to the next power of two, whose reciprocal is exact
        bits = (gl.cast(scale, gl.int32, bitcast=True) + FRACTION_BITS) & EXPONENT_BITS
        scale = gl.cast(bits, gl.float32, bitcast=True)
        factor = gl.cast(ONE_SQUARED_BITS - bits, gl.float32, bitcast=True)
    else:
        factor = gl.div_rn(1.0, scale)
    return scale, factor


@gluon.jit
def _store_scale(scale, results, row, first_row, count, column, num_rows, SUMS: gl.constexpr):  # noqa: N803
    out, out_scale = results
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS))
    places = out_scale + (column // HALF).to(gl.int64) * num_rows + first_row + row_ids
    gl.store(places, scale, mask=row_ids < count)


@gluon.jit
def _quantize(values, scale, factor, HAS_UE8M0_SCALES: gl.constexpr):  # noqa: N803
    """Numbers for a cast that rounds: values over scale, as division rounds them.

    NOTE(numerics): a product with the reciprocal, and what is then left over, once more (Markstein, 1990); a division
    of each would call a subroutine, around which the loop's sums are spilled.
    """
    factor = gl.expand_dims(factor, 1)
    quotient = values * factor
    if not HAS_UE8M0_SCALES:
        left_over = gl.fma(-quotient, gl.expand_dims(scale, 1), values)
        quotient = gl.fma(left_over, factor, quotient)
    return gl.where(quotient > LARGEST, LARGEST, gl.where(quotient < -LARGEST, -LARGEST, quotient))  # NaN stays


@gluon.jit
def _store(value, results, row, first_row, count, column, num_columns):
    out, out_scale = results
    dtype: gl.constexpr = out.dtype.element_ty
    STORED: gl.constexpr = lay_out_stores(QUARTER, dtype)  # noqa: N806
    value = gl.convert_layout(value.to(dtype), STORED)
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, STORED))
    columns = column + gl.arange(0, QUARTER, layout=gl.SliceLayout(0, STORED))
    places = gl.expand_dims((first_row + row_ids).to(gl.int64) * num_columns, 1) + gl.expand_dims(columns, 0)
    is_stored = gl.expand_dims(row_ids < count, 1) & gl.expand_dims(columns < num_columns, 0)
    gl.store(out + places, value, mask=is_stored)
