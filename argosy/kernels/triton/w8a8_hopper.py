"""The product of ``w8a8_gemm.py`` for many rows, written out by hand for Hopper cards. Same results.

Where sums are integers, Triton waits for a block of products before the next one. Here a block's products are issued
while those of the block before are under way, by two warp groups that walk the tiles of ``hopper_tiles.py``. Invariant:
the last products on a block of the ring are done before it is given back.

Shape letters: those of ``w8a8_gemm.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from argosy.kernels.triton.dependent_launch_gluon import let_next_start, wait_for_inputs
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

INSTRUCTION_N = gl.constexpr(128)  # the most that Triton has for integers
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit(do_not_specialize=["num_rows"])
def multiply_on_hopper(
    x_tiles,
    weight_tiles,
    x_scale,
    weight_scale,
    counts,
    num_taken,
    out,
    num_rows,
    num_experts,
    num_columns,
    out_features,
    in_features,
    WALKED_TILES: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    NUM_STAGES: gl.constexpr,  # noqa: N803
    LEAD: gl.constexpr,  # noqa: N803
    HAS_QUEUE: gl.constexpr,  # noqa: N803
    PADDED_EXPERTS: gl.constexpr,  # noqa: N803
    IS_GATED: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    let_next_start()
    buffers, queue = open_ring(x_tiles, weight_tiles, num_taken, NUM_STAGES)
    wait_for_inputs()
    walk = (counts, num_rows, num_experts, num_columns)
    sizes = (out_features, in_features)
    results = (x_scale, weight_scale, out)
    # Tuples that have a name lose their constants, so these are written out.
    gl.warp_specialize(
        # fmt: off
        [
            (
                _multiply,
                (
                    0,
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
                ),
            ),
            (
                _multiply,
                (
                    1,
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
):
    rows, weights, full, empty = buffers
    counts, num_rows, num_experts, num_columns = walk
    out_features, in_features = sizes
    WIDTH: gl.constexpr = weights.shape[1]  # noqa: N806
    BLOCK_K: gl.constexpr = weights.shape[2]  # noqa: N806
    TILE_N: gl.constexpr = WIDTH // 2 if IS_GATED else WIDTH  # noqa: N806
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, INSTRUCTION_N, 32])  # noqa: N806
    # One block at least: with a loop that may not run, the compiler lets the tensor cores wait for each product.
    num_blocks = gl.maximum((in_features + BLOCK_K - 1) // BLOCK_K, 1)
    block = 0
    turn = 0
    tile = find_first_tile(walk, TILE_N, WALKED_TILES, IS_DENSE)
    while tile[0] < num_experts:
        expert, place, first_row, count, tile_row, column = tile
        row = tile_row + group * GROUP_ROWS
        if row < count:
            await_lead(group, block, num_blocks, buffers, NUM_STAGES, LEAD)
            total = gl.zeros([GROUP_ROWS, WIDTH], gl.int32, layout=SUMS)
            for number in range(num_blocks):
                stage = (block + number) % NUM_STAGES
                mbarrier.wait(full.index(stage), find_round(block + number, NUM_STAGES))
                block_rows = rows.index(stage * NUM_GROUPS + group)
                products = warpgroup_mma(block_rows, weights.index(stage).permute((1, 0)), total, is_async=True)
                total = warpgroup_mma_wait(1, deps=(products,))
                before = (block + number + NUM_STAGES - 1) % NUM_STAGES
                mbarrier.arrive(empty.index(before * NUM_GROUPS + group), pred=number > 0)
            # What the results and the next tile need is looked up while the last products are under way.
            step = await_step(queue, turn, NUM_STAGES, HAS_QUEUE)
            tile = find_next_tile(tile, step, walk, TILE_N, WALKED_TILES, IS_DENSE)
            row_scale, column_scale = _load_scales(
                results, row, first_row, count, expert * out_features + column, column, num_columns, SUMS, WIDTH, TILE_N
            )
            total = warpgroup_mma_wait(0, deps=(total,))
            last = (block + num_blocks - 1) % NUM_STAGES
            mbarrier.arrive(empty.index(last * NUM_GROUPS + group))
            # NOTE(numerics): the row's scale first, then the column's, as the reference does.
            value = total.to(gl.float32) * gl.expand_dims(row_scale, 1) * gl.expand_dims(column_scale, 0)
            _store(value, results, row, first_row, count, column, num_columns, TILE_N)
        else:
            follow_blocks(group, block, num_blocks, buffers, NUM_STAGES)
            step = await_step(queue, turn, NUM_STAGES, HAS_QUEUE)
            tile = find_next_tile(tile, step, walk, TILE_N, WALKED_TILES, IS_DENSE)
        block += num_blocks
        turn += 1


@gluon.jit
def _load_scales(
    results,
    row,
    first_row,
    count,
    weight_row,
    column,
    num_columns,
    SUMS: gl.constexpr,  # noqa: N803
    WIDTH: gl.constexpr,  # noqa: N803
    TILE_N: gl.constexpr,  # noqa: N803
):
    x_scale, weight_scale, out = results
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, SUMS))
    row_scale = gl.load(x_scale + first_row + row_ids, mask=row_ids < count, other=0.0)
    numbers = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, SUMS))
    # Gate's columns, then up's; the other way to say it for a tile that has one kind.
    weight_rows = numbers % TILE_N + numbers // TILE_N * num_columns
    is_column = column + numbers % TILE_N < num_columns
    return row_scale, gl.load(weight_scale + weight_row + weight_rows, mask=is_column, other=0.0)


@gluon.jit
def _store(value, results, row, first_row, count, column, num_columns, TILE_N: gl.constexpr):  # noqa: N803
    x_scale, weight_scale, out = results
    dtype: gl.constexpr = out.dtype.element_ty
    if value.shape[1] > TILE_N:
        gate, up = gl.split(gl.permute(gl.reshape(value, [GROUP_ROWS, 2, TILE_N]), (0, 2, 1)))
        value = gate / (1.0 + gl.exp2(gate * -LOG2_E)) * up
    STORED: gl.constexpr = lay_out_stores(TILE_N, dtype)  # noqa: N806
    value = gl.convert_layout(value.to(dtype), STORED)
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, STORED))
    columns = column + gl.arange(0, TILE_N, layout=gl.SliceLayout(0, STORED))
    places = gl.expand_dims((first_row + row_ids).to(gl.int64) * num_columns, 1) + gl.expand_dims(columns, 0)
    is_stored = gl.expand_dims(row_ids < count, 1) & gl.expand_dims(columns < num_columns, 0)
    gl.store(out + places, value, mask=is_stored)
