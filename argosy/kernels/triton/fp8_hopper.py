"""The product of ``fp8_gemm.py`` for many rows, written out by hand for Hopper cards.

Two warp groups walk the tiles of ``hopper_tiles.py``. A block's products are made a quarter of the tile's columns at a
time: while a group scales and adds one quarter's sums in ordinary float32 units, the tensor cores have its next one, or
the other group's. Sums of two quarters are all that its registers hold beside the totals. A few blocks of K are one
stretch of the program, within which the next block's first quarters start before this one's last is added; between two
stretches the compiler wants everything waited for. So a group awaits a block before it gives the one before back, which
a ring of more blocks than ``lead`` allows. Scales are asked for a block of K ahead. Invariant: every output is the sum,
in order, of its blocks' sums times scales, whatever the stretches.

Shape letters: those of ``fp8_gemm.py``.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from argosy.kernels.triton.dependent_launch_gluon import let_next_start, wait_for_inputs
from argosy.kernels.triton.fp8_hopper_results import (
    HALF,
    QUARTER,
    find_group_scale,
    quantize,
    silu_mul,
    store,
    store_scale,
)
from argosy.kernels.triton.hopper_tiles import (
    GROUP_ROWS,
    NUM_GROUPS,
    REGISTERS,
    HopperTile,
    await_lead,
    await_step,
    copy_blocks,
    find_first_tile,
    find_next_tile,
    find_round,
    follow_blocks,
    open_ring,
)


@dataclass(frozen=True, slots=True)
class Fp8HopperTile(HopperTile):
    """A tile of which each group has half the rows."""

    num_unrolled: int = 4  # blocks of K in a stretch


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
    NUM_UNROLLED: gl.constexpr,  # noqa: N803
    HAS_QUEUE: gl.constexpr,  # noqa: N803
    PADDED_EXPERTS: gl.constexpr,  # noqa: N803
    IS_GATED: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
    IS_QUANTIZED: gl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: gl.constexpr,  # noqa: N803
    HIDDEN_DTYPE: gl.constexpr,  # noqa: N803
):
    let_next_start()
    buffers, queue = open_ring(x_tiles, weight_tiles, num_taken, NUM_STAGES)
    wait_for_inputs()
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
                    NUM_UNROLLED,
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
                    NUM_UNROLLED,
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
                    PADDED_EXPERTS,
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
    NUM_UNROLLED: gl.constexpr,  # noqa: N803
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
            ahead = _load_scales(places, scales, 0)
            await_lead(group, block, num_blocks, buffers, NUM_STAGES, LEAD)
            nothing = gl.zeros([GROUP_ROWS, QUARTER], gl.float32, layout=SUMS)
            totals = (nothing, nothing, nothing, nothing)
            sums = (nothing, nothing)
            num_whole = num_blocks // NUM_UNROLLED * NUM_UNROLLED
            for number in range(0, num_whole, NUM_UNROLLED):
                totals, sums, ahead = _add_blocks(
                    group, block, number, num_blocks, totals, sums, ahead, places, scales, buffers, SUMS,
                    NUM_STAGES, NUM_UNROLLED,
                )  # fmt: skip
            for number in range(num_whole, num_blocks):
                totals, sums, ahead = _add_blocks(
                    group, block, number, num_blocks, totals, sums, ahead, places, scales, buffers, SUMS,
                    NUM_STAGES, 1,
                )  # fmt: skip
            total_0, total_1, total_2, total_3 = totals
            if IS_GATED:
                total_0 = silu_mul(total_0, total_2, HIDDEN_DTYPE)
                total_1 = silu_mul(total_1, total_3, HIDDEN_DTYPE)
            if IS_QUANTIZED:
                scale, factor = find_group_scale(total_0, total_1, HAS_UE8M0_SCALES)
                store_scale(scale, results, row, first_row, count, column, num_rows, SUMS)
                total_0 = quantize(total_0, scale, factor, HAS_UE8M0_SCALES)
            store(total_0, results, row, first_row, count, column, num_columns)
            if IS_QUANTIZED:
                total_1 = quantize(total_1, scale, factor, HAS_UE8M0_SCALES)
            store(total_1, results, row, first_row, count, column + QUARTER, num_columns)
            if not IS_GATED:
                store(total_2, results, row, first_row, count, column + HALF, num_columns)
                store(total_3, results, row, first_row, count, column + HALF + QUARTER, num_columns)
        else:
            follow_blocks(group, block, num_blocks, buffers, NUM_STAGES)
        step = await_step(queue, turn, NUM_STAGES, HAS_QUEUE)
        tile = find_next_tile(tile, step, walk, TILE_N, WALKED_TILES, IS_DENSE)
        block += num_blocks
        turn += 1


@gluon.jit
def _add_blocks(
    group: gl.constexpr,
    first_block,
    number,
    num_blocks,
    totals,
    sums,
    ahead,
    places,
    scales,
    buffers,
    SUMS: gl.constexpr,  # noqa: N803
    NUM_STAGES: gl.constexpr,  # noqa: N803
    NUM_UNROLLED: gl.constexpr,  # noqa: N803
):
    """The stretch of blocks from ``number`` on. ``ahead``: the first one's scales; ``sums`` are there for their
    registers.
    """
    rows, weights, full, empty = buffers
    total_0, total_1, total_2, total_3 = totals
    even, odd = sums
    block = first_block + number
    block_rows, box = _await_block(group, block, buffers, NUM_STAGES)
    even = _multiply_quarter(block_rows, box, 0, even)
    odd = _multiply_quarter(block_rows, box, 1, odd)
    for step in gl.static_range(NUM_UNROLLED):
        row_scale, left_scale, right_scale = ahead
        ahead = _load_scales(places, scales, gl.minimum(number + step + 1, num_blocks - 1))
        left = gl.expand_dims(row_scale * left_scale, 1)
        right = gl.expand_dims(row_scale * right_scale, 1)
        even = warpgroup_mma_wait(1, deps=(even,))
        total_0 = _add_scaled(total_0, even, left)
        even = _multiply_quarter(block_rows, box, 2, even)
        odd = warpgroup_mma_wait(1, deps=(odd,))
        total_1 = _add_scaled(total_1, odd, left)
        odd = _multiply_quarter(block_rows, box, 3, odd)
        emptied = empty.index((block + step) % NUM_STAGES * NUM_GROUPS + group)
        if step + 1 < NUM_UNROLLED:
            block_rows, box = _await_block(group, block + step + 1, buffers, NUM_STAGES)
            even = warpgroup_mma_wait(1, deps=(even,))
            total_2 = _add_scaled(total_2, even, right)
            even = _multiply_quarter(block_rows, box, 0, even)
            odd = warpgroup_mma_wait(1, deps=(odd,))
            total_3 = _add_scaled(total_3, odd, right)
            odd = _multiply_quarter(block_rows, box, 1, odd)
        else:
            even = warpgroup_mma_wait(1, deps=(even,))
            total_2 = _add_scaled(total_2, even, right)
            odd = warpgroup_mma_wait(0, deps=(odd,))
            total_3 = _add_scaled(total_3, odd, right)
        mbarrier.arrive(emptied)
    return (total_0, total_1, total_2, total_3), (even, odd), ahead


@gluon.jit
def _await_block(group: gl.constexpr, block, buffers, NUM_STAGES: gl.constexpr):  # noqa: N803
    """The group's rows of it, and its box of weights."""
    rows, weights, full, empty = buffers
    stage = block % NUM_STAGES
    mbarrier.wait(full.index(stage), find_round(block, NUM_STAGES))
    return rows.index(stage * NUM_GROUPS + group), weights.index(stage)


@gluon.jit
def _multiply_quarter(block_rows, box, quarter: gl.constexpr, sums):
    """Starts it. The sums before are written over: so the compiler takes their registers, and no others."""
    columns = box.slice(quarter * QUARTER, QUARTER).permute((1, 0))
    return warpgroup_mma(block_rows, columns, sums, use_acc=False, is_async=True)


@gluon.jit
def _add_scaled(total, sums, scale):
    """total + sums * scale, rounded once.

    NOTE(order): here, and nowhere else, hence the impure assembly: the compiler moves pure sums behind the stretch's
    last product, and then has no registers for what they wait for.
    """
    operands = [sums, scale, total]
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", operands, dtype=gl.float32, is_pure=False, pack=1
    )


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
