"""The product of ``fp8_gemm.py`` for many rows, written out by hand for Hopper cards.

Two warp groups walk the tiles of ``hopper_tiles.py``. One scales and adds the sums of a block in ordinary float32 units
while the tensor cores have the other's products; a tile's two halves take turns, so that a group holds the sums of one.
Scales are asked for a block of K ahead. Invariant: every output is the sum, in order, of its blocks' sums times scales.

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
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])  # noqa: N806
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
            left = gl.zeros([GROUP_ROWS, HALF], gl.float32, layout=SUMS)
            right = left
            sums = left
            for number in range(num_blocks):
                next_scales = _load_scales(places, scales, gl.minimum(number + 1, num_blocks - 1))
                stage = (block + number) % NUM_STAGES
                mbarrier.wait(full.index(stage), find_round(block + number, NUM_STAGES))
                block_rows = rows.index(stage * NUM_GROUPS + group)
                box = weights.index(stage)
                sums = _multiply_half(block_rows, box.slice(0, HALF), sums)
                left = left + sums * gl.expand_dims(row_scale * left_scale, 1)
                sums = _multiply_half(block_rows, box.slice(HALF, HALF), sums)
                mbarrier.arrive(empty.index(stage * NUM_GROUPS + group))
                right = right + sums * gl.expand_dims(row_scale * right_scale, 1)
                row_scale, left_scale, right_scale = next_scales
            if IS_GATED:
                left = _gate(left, right, HIDDEN_DTYPE)
            if IS_QUANTIZED:
                left = _quantize(left, results, row, first_row, count, column, num_rows, HAS_UE8M0_SCALES, SUMS)
            if not IS_GATED:
                _store(right, results, row, first_row, count, column + HALF, num_columns)
            _store(left, results, row, first_row, count, column, num_columns)
        else:
            follow_blocks(group, block, num_blocks, buffers, NUM_STAGES)
        step = await_step(queue, turn, NUM_STAGES, HAS_QUEUE)
        tile = find_next_tile(tile, step, walk, TILE_N, WALKED_TILES, IS_DENSE)
        block += num_blocks
        turn += 1


@gluon.jit
def _multiply_half(block_rows, block_weights, sums):
    """The sums before are written over: so the compiler takes their registers, and no others."""
    sums = warpgroup_mma(block_rows, block_weights.permute((1, 0)), sums, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(sums,))


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
def _quantize(
    values,
    results,
    row,
    first_row,
    count,
    column,
    num_rows,
    HAS_UE8M0_SCALES: gl.constexpr,  # noqa: N803
    SUMS: gl.constexpr,  # noqa: N803
):
    """As ``quantize_groups.quantize_last_dim``, but that the cast rounds. Stores the scales."""
    out, out_scale = results
    scale = gl.div_rn(gl.maximum(gl.max(gl.abs(values), axis=1), SMALLEST_AMAX), LARGEST)
    if HAS_UE8M0_SCALES:  # up to the next power of two, whose reciprocal is exact
        bits = (gl.cast(scale, gl.int32, bitcast=True) + FRACTION_BITS) & EXPONENT_BITS
        scale = gl.cast(bits, gl.float32, bitcast=True)
        quotient = values * gl.expand_dims(gl.cast(ONE_SQUARED_BITS - bits, gl.float32, bitcast=True), 1)
    else:
        quotient = gl.div_rn(values, gl.expand_dims(scale, 1))
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS))
    places = out_scale + (column // HALF).to(gl.int64) * num_rows + first_row + row_ids
    gl.store(places, scale, mask=row_ids < count)
    return gl.where(quotient > LARGEST, LARGEST, gl.where(quotient < -LARGEST, -LARGEST, quotient))  # NaN stays


@gluon.jit
def _store(value, results, row, first_row, count, column, num_columns):
    out, out_scale = results
    dtype: gl.constexpr = out.dtype.element_ty
    STORED: gl.constexpr = lay_out_stores(HALF, dtype)  # noqa: N806
    value = gl.convert_layout(value.to(dtype), STORED)
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, STORED))
    columns = column + gl.arange(0, HALF, layout=gl.SliceLayout(0, STORED))
    places = gl.expand_dims((first_row + row_ids).to(gl.int64) * num_columns, 1) + gl.expand_dims(columns, 0)
    is_stored = gl.expand_dims(row_ids < count, 1) & gl.expand_dims(columns < num_columns, 0)
    gl.store(out + places, value, mask=is_stored)
