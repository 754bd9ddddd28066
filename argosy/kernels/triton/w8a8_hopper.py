"""The product of ``w8a8_gemm.py`` for many rows, written out by hand for Hopper cards. Same results.

Where sums are integers, Triton waits for a block of products before the next one. Here one warp copies blocks of K to
a ring of buffers, and two warp groups multiply: a tile's upper 64 rows and its lower 64, each at its own pace. A
block's products are issued while those of the block before are under way. The lower group begins a tile ``LEAD`` blocks
behind the upper one, so that one multiplies while the other writes its results; a group without rows just follows.

Invariant: all three walk the same blocks, those of ``_find_tile``, and each fills or empties every block just once.
No deadlock: a copy waits for both groups to empty the block ``NUM_STAGES`` before it, a group for its block's copy, and
the lower one at a tile's start for the upper to empty a block fewer than ``NUM_STAGES`` ahead, which needs nothing that
the lower one has not done; so whoever has the earliest block to do can go on, whatever the counts. No barrier completes
again while somebody waits for it, because its next completion needs that one's own work.

Shape letters: those of ``w8a8_gemm.py``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

GROUP_ROWS = gl.constexpr(64)  # of a warp group: the tensor instruction's
NUM_GROUPS = gl.constexpr(2)
TILE_ROWS = gl.constexpr(128)
INSTRUCTION_N = gl.constexpr(128)  # the most that Triton has for integers
REGISTERS = gl.constexpr((240, 24))  # a thread's: of the lower group (the upper one gets the same) and of the copies
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def multiply_on_hopper(
    x_tiles,
    weight_tiles,
    x_scale,
    weight_scale,
    counts,
    out,
    num_rows,
    num_experts,
    num_columns,
    out_features,
    in_features,
    WALKED_TILES: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    NUM_STAGES: gl.constexpr,  # noqa: N803
    LEAD: gl.constexpr,  # noqa: N803
    IS_GATED: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    # A block of weights is two boxes: neighbours, or a box of gate's rows and one of up's.
    BOX_N: gl.constexpr = weight_tiles.block_shape[0]  # noqa: N806
    BLOCK_K: gl.constexpr = weight_tiles.block_shape[1]  # noqa: N806
    rows = gl.allocate_shared_memory(gl.int8, [NUM_STAGES * NUM_GROUPS, GROUP_ROWS, BLOCK_K], x_tiles.layout)
    weights = gl.allocate_shared_memory(gl.int8, [NUM_STAGES, 2 * BOX_N, BLOCK_K], weight_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES * NUM_GROUPS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        for group in gl.static_range(NUM_GROUPS):
            mbarrier.init(empty.index(stage * NUM_GROUPS + group), count=1)
    fence_async_shared()
    buffers = (rows, weights, full, empty)
    walk = (counts, num_rows, num_experts, num_columns)
    sizes = (out_features, in_features)
    results = (x_scale, weight_scale, out)
    # Tuples that have a name lose their constants, so these are written out.
    gl.warp_specialize(
        [
            (_multiply, (0, results, buffers, walk, sizes, WALKED_TILES, NUM_STAGES, LEAD, IS_GATED, IS_DENSE)),
            (_multiply, (1, results, buffers, walk, sizes, WALKED_TILES, NUM_STAGES, LEAD, IS_GATED, IS_DENSE)),
            (_copy, (x_tiles, weight_tiles, buffers, walk, sizes, WALKED_TILES, NUM_STAGES, IS_GATED, IS_DENSE)),
        ],
        [4, 1],
        REGISTERS,
    )


@gluon.jit
def _copy(
    x_tiles,
    weight_tiles,
    buffers,
    walk,
    sizes,
    WALKED_TILES: gl.constexpr,  # noqa: N803
    NUM_STAGES: gl.constexpr,  # noqa: N803
    IS_GATED: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    rows, weights, full, empty = buffers
    counts, num_rows, num_experts, num_columns = walk
    out_features, in_features = sizes
    BOX_N: gl.constexpr = weight_tiles.block_shape[0]  # noqa: N806
    BLOCK_K: gl.constexpr = weight_tiles.block_shape[1]  # noqa: N806
    TILE_N: gl.constexpr = BOX_N if IS_GATED else 2 * BOX_N  # noqa: N806
    second_box = num_columns if IS_GATED else BOX_N
    block = 0
    tile = _find_first_tile(walk, TILE_N, WALKED_TILES, IS_DENSE)
    while tile[0] < num_experts:
        expert, place, first_row, count, row, column = tile
        weight_row = expert * out_features + column
        is_lower = row + GROUP_ROWS < count
        for k in range(0, in_features, BLOCK_K):
            stage = block % NUM_STAGES
            for group in gl.static_range(NUM_GROUPS):
                mbarrier.wait(empty.index(stage * NUM_GROUPS + group), _round(block, NUM_STAGES) ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (2 * BOX_N + TILE_ROWS) * BLOCK_K, pred=is_lower)
            mbarrier.expect(arrived, (2 * BOX_N + GROUP_ROWS) * BLOCK_K, pred=row + GROUP_ROWS >= count)
            upper, lower = rows.index(stage * NUM_GROUPS), rows.index(stage * NUM_GROUPS + 1)
            box = weights.index(stage)
            # What lies behind a tensor's end becomes zeros; what is another expert's is computed and not stored.
            tma.async_copy_global_to_shared(x_tiles, [first_row + row, k], arrived, upper)
            tma.async_copy_global_to_shared(x_tiles, [first_row + row + GROUP_ROWS, k], arrived, lower, pred=is_lower)
            tma.async_copy_global_to_shared(weight_tiles, [weight_row, k], arrived, box.slice(0, BOX_N))
            tma.async_copy_global_to_shared(
                weight_tiles, [weight_row + second_box, k], arrived, box.slice(BOX_N, BOX_N)
            )
            block += 1
        tile = _find_next_tile(tile, walk, TILE_N, WALKED_TILES, IS_DENSE)


@gluon.jit
def _multiply(
    group: gl.constexpr,
    results,
    buffers,
    walk,
    sizes,
    WALKED_TILES: gl.constexpr,  # noqa: N803
    NUM_STAGES: gl.constexpr,  # noqa: N803
    LEAD: gl.constexpr,  # noqa: N803
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
    tile = _find_first_tile(walk, TILE_N, WALKED_TILES, IS_DENSE)
    while tile[0] < num_experts:
        expert, place, first_row, count, tile_row, column = tile
        row = tile_row + group * GROUP_ROWS
        if row < count:
            if group > 0 and LEAD > 0:
                ahead = block + gl.minimum(LEAD, num_blocks) - 1
                mbarrier.wait(empty.index(ahead % NUM_STAGES * NUM_GROUPS), _round(ahead, NUM_STAGES))
            total = gl.zeros([GROUP_ROWS, WIDTH], gl.int32, layout=SUMS)
            for step in range(num_blocks):
                stage = (block + step) % NUM_STAGES
                mbarrier.wait(full.index(stage), _round(block + step, NUM_STAGES))
                block_rows = rows.index(stage * NUM_GROUPS + group)
                products = warpgroup_mma(block_rows, weights.index(stage).permute((1, 0)), total, is_async=True)
                total = warpgroup_mma_wait(1, deps=(products,))
                before = (block + step + NUM_STAGES - 1) % NUM_STAGES
                mbarrier.arrive(empty.index(before * NUM_GROUPS + group), pred=step > 0)
            # What the results and the next tile need is looked up while the last products are under way.
            tile = _find_next_tile(tile, walk, TILE_N, WALKED_TILES, IS_DENSE)
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
            tile = _find_next_tile(tile, walk, TILE_N, WALKED_TILES, IS_DENSE)
            for step in range(num_blocks):
                stage = (block + step) % NUM_STAGES
                mbarrier.wait(full.index(stage), _round(block + step, NUM_STAGES))
                mbarrier.arrive(empty.index(stage * NUM_GROUPS + group))
        block += num_blocks


@gluon.jit
def _round(block, NUM_STAGES: gl.constexpr):  # noqa: N803
    """The parity of a barrier's completion that belongs to this block."""
    return (block // NUM_STAGES) & 1


@gluon.jit
def _count_rows(expert, walk, IS_DENSE: gl.constexpr):  # noqa: N803
    counts, num_rows, num_experts, num_columns = walk
    if IS_DENSE:
        count = gl.where(expert == 0, num_rows, 0)
    else:
        count = gl.load(counts + expert, mask=expert < num_experts, other=0)
    return count


@gluon.jit
def _find_first_tile(
    walk,
    TILE_N: gl.constexpr,  # noqa: N803
    WALKED_TILES: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    """A program's: (expert, the tile's number among that one's, the expert's first row and number of rows, the tile's
    first row among them, its column). Behind all tiles the expert is ``num_experts``.
    """
    expert = 0
    first_row = 0
    count = _count_rows(expert, walk, IS_DENSE)
    return _find_tile(expert, gl.program_id(0), first_row, count, walk, TILE_N, WALKED_TILES, IS_DENSE)


@gluon.jit
def _find_next_tile(
    tile,
    walk,
    TILE_N: gl.constexpr,  # noqa: N803
    WALKED_TILES: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    expert, place, first_row, count, row, column = tile
    return _find_tile(expert, place + gl.num_programs(0), first_row, count, walk, TILE_N, WALKED_TILES, IS_DENSE)


@gluon.jit
def _find_tile(
    expert,
    place,
    first_row,
    count,
    walk,
    TILE_N: gl.constexpr,  # noqa: N803
    WALKED_TILES: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    """``place``: a number among this expert's tiles and those behind. Columns of a few row tiles come first, for the
    cache's sake.
    """
    counts, num_rows, num_experts, num_columns = walk
    column_tiles = (num_columns + TILE_N - 1) // TILE_N
    row_tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    while (expert < num_experts) & (place >= row_tiles * column_tiles):
        place = place - row_tiles * column_tiles
        first_row = first_row + count
        expert = expert + 1
        count = _count_rows(expert, walk, IS_DENSE)
        row_tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    first = place // (WALKED_TILES * column_tiles) * WALKED_TILES
    height = gl.maximum(gl.minimum(row_tiles - first, WALKED_TILES), 1)
    place_in_walk = place - first * column_tiles
    row = (first + place_in_walk % height) * TILE_ROWS
    return expert, place, first_row, count, row, place_in_walk // height * TILE_N


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
    STORED: gl.constexpr = _lay_out_stores(TILE_N, dtype)  # noqa: N806
    value = gl.convert_layout(value.to(dtype), STORED)
    row_ids = row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, STORED))
    columns = column + gl.arange(0, TILE_N, layout=gl.SliceLayout(0, STORED))
    places = gl.expand_dims((first_row + row_ids).to(gl.int64) * num_columns, 1) + gl.expand_dims(columns, 0)
    is_stored = gl.expand_dims(row_ids < count, 1) & gl.expand_dims(columns < num_columns, 0)
    gl.store(out + places, value, mask=is_stored)


@gluon.constexpr_function
def _lay_out_stores(columns, dtype):
    """16 bytes a thread. Rows stay in the warp where the tensor instruction leaves them, so that nobody waits."""
    vector = 128 // dtype.primitive_bitwidth
    registers = [[0, 1 << bit] for bit in range(vector.bit_length() - 1)]
    registers += [[8, 0]] + [[0, part] for part in (32, 64, 128) if 4 * vector <= part < columns]
    if 4 * vector < 32:
        registers.append([0, 16])
    lanes = [[0, vector], [0, 2 * vector], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])
