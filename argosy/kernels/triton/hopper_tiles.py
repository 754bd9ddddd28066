"""What the hand-written products for Hopper cards share: how a program goes from tile to tile, and its ring of buffers.

One warp copies blocks of K to the ring, and two warp groups multiply: a tile's upper 64 rows and its lower 64, each at
its own pace. The lower group begins a tile ``LEAD`` blocks behind the upper one, so that one multiplies while the other
writes its results; a group without rows just follows. With a queue, a program takes the next tile when it has asked for
all of this one's blocks: tiles of few rows are short, and without it those that share weights drift apart until the
card's cache holds them no more. The copying warp tells the groups how far they go.

Invariant: all three walk the same blocks, those of ``_find_tile``, and each fills or empties every block just once.
No deadlock: a copy waits for both groups to empty the block ``NUM_STAGES`` before it, a group for its block's copy, and
the lower one at a tile's start for the upper to empty a block fewer than ``NUM_STAGES`` ahead, which needs nothing that
the lower one has not done; so whoever has the earliest block to do can go on, whatever the counts. No barrier completes
again while somebody waits for it, because its next completion needs that one's own work; and a step is written over
only ``NUM_STAGES + 1`` tiles later, when the ring has carried a block behind it that both groups have emptied.

Shape letters: those of ``w8a8_gemm.py``.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

GROUP_ROWS = gl.constexpr(64)  # of a warp group: the tensor instruction's
NUM_GROUPS = gl.constexpr(2)
TILE_ROWS = gl.constexpr(128)
REGISTERS = gl.constexpr((240, 24))  # a thread's: of the lower group (the upper one gets the same) and of the copies
STEPS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# One number, which every thread has: of the warp that copies, of a group.
ONE_TOLD = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
ONE_HEARD = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@dataclass(frozen=True, slots=True)
class HopperTile:
    """What a program does at once: 128 rows times two boxes of weights."""

    box_n: int = 128  # two neighbours, or of gate and of up
    box_rows: int = 64  # that are copied at once: an expert's last rows come in as many boxes as they fill
    block_k: int = 128
    num_stages: int = 4
    lead: int = 1  # blocks of K that the upper rows are ahead of the lower ones at a tile's start
    walked_tiles: int = 8  # row tiles that are walked together, for the cache's sake
    has_queue: bool = True  # for experts; otherwise a program takes every 132nd tile, as it does of a dense linear

    def __post_init__(self) -> None:
        assert GROUP_ROWS.value % self.box_rows == 0, "a box would have rows of both groups"
        assert 0 <= self.lead < self.num_stages, "the lower rows would wait for a block that waits for them"


@gluon.jit
def open_ring(x_tiles, weight_tiles, num_taken, NUM_STAGES: gl.constexpr):  # noqa: N803 - Triton's constants
    """Buffers and a queue. A block of weights is two boxes: neighbours, or a box of gate's rows and one of up's."""
    BOX_N: gl.constexpr = weight_tiles.block_shape[0]  # noqa: N806
    BLOCK_K: gl.constexpr = weight_tiles.block_shape[1]  # noqa: N806
    rows = gl.allocate_shared_memory(x_tiles.dtype, [NUM_STAGES * NUM_GROUPS, GROUP_ROWS, BLOCK_K], x_tiles.layout)
    weights = gl.allocate_shared_memory(x_tiles.dtype, [NUM_STAGES, 2 * BOX_N, BLOCK_K], weight_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES * NUM_GROUPS, 1], mbarrier.MBarrierLayout())
    steps = gl.allocate_shared_memory(gl.int32, [NUM_STAGES + 1, 1], STEPS)
    told = gl.allocate_shared_memory(gl.int64, [NUM_STAGES + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
    for number in gl.static_range(NUM_STAGES * NUM_GROUPS):
        mbarrier.init(empty.index(number), count=1)
    for number in gl.static_range(NUM_STAGES + 1):
        mbarrier.init(told.index(number), count=1)
    fence_async_shared()
    return (rows, weights, full, empty), (num_taken, steps, told)


@gluon.jit
def copy_blocks(
    x_tiles,
    weight_tiles,
    buffers,
    queue,
    walk,
    sizes,
    WALKED_TILES: gl.constexpr,  # noqa: N803
    NUM_STAGES: gl.constexpr,  # noqa: N803
    HAS_QUEUE: gl.constexpr,  # noqa: N803
    PADDED_EXPERTS: gl.constexpr,  # noqa: N803
    IS_GATED: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    """The program of the warp that fills the ring; it also takes the next tiles from the queue."""
    rows, weights, full, empty = buffers
    counts, num_rows, num_experts, num_columns = walk
    out_features, in_features = sizes
    BOX_N: gl.constexpr = weight_tiles.block_shape[0]  # noqa: N806
    BLOCK_K: gl.constexpr = weight_tiles.block_shape[1]  # noqa: N806
    BOX_ROWS: gl.constexpr = x_tiles.block_shape[0]  # noqa: N806
    TILE_N: gl.constexpr = BOX_N if IS_GATED else 2 * BOX_N  # noqa: N806
    second_box = num_columns if IS_GATED else BOX_N
    block = 0
    turn = 0
    taken = gl.program_id(0)
    tile = find_first_tile(walk, TILE_N, WALKED_TILES, IS_DENSE)
    if HAS_QUEUE:
        num_tiles = _count_tiles(walk, TILE_N, PADDED_EXPERTS)
    while tile[0] < num_experts:
        expert, place, first_row, count, row, column = tile
        weight_row = expert * out_features + column
        num_boxes = gl.minimum((count - row + BOX_ROWS - 1) // BOX_ROWS, TILE_ROWS // BOX_ROWS)
        for k in range(0, in_features, BLOCK_K):
            stage = block % NUM_STAGES
            for group in gl.static_range(NUM_GROUPS):
                mbarrier.wait(empty.index(stage * NUM_GROUPS + group), find_round(block, NUM_STAGES) ^ 1)
            arrived = full.index(stage)
            for number in gl.static_range(TILE_ROWS // BOX_ROWS):
                mbarrier.expect(arrived, (2 * BOX_N + (number + 1) * BOX_ROWS) * BLOCK_K, pred=num_boxes == number + 1)
            _copy_rows(x_tiles, first_row + row, k, num_boxes, rows, stage, arrived)
            box = weights.index(stage)
            tma.async_copy_global_to_shared(weight_tiles, [weight_row, k], arrived, box.slice(0, BOX_N))
            tma.async_copy_global_to_shared(
                weight_tiles, [weight_row + second_box, k], arrived, box.slice(BOX_N, BOX_N)
            )
            block += 1
        step = gl.num_programs(0)
        if HAS_QUEUE:
            num_taken, steps, told = queue
            # Not before the last copy is on its way: tiles that share weights must start at almost the same time.
            num_before = gl.atomic_add(num_taken, 1, sem="relaxed")
            # Each tile is followed by one such question, so this is the last one.
            gl.store(num_taken, 0, mask=num_before == num_tiles - 1)
            step = num_before + gl.num_programs(0) - taken
            taken += step
            slot = turn % (NUM_STAGES + 1)
            steps.index(slot).store(gl.full([1], step, gl.int32, layout=ONE_TOLD))
            mbarrier.arrive(told.index(slot))
            turn += 1
        tile = find_next_tile(tile, step, walk, TILE_N, WALKED_TILES, IS_DENSE)


@gluon.jit
def _copy_rows(x_tiles, first_row, k, num_boxes, rows, stage, arrived):
    """What lies behind a tensor's end becomes zeros; what is another expert's, or was not copied, is computed and not
    stored.
    """
    BOX_ROWS: gl.constexpr = x_tiles.block_shape[0]  # noqa: N806
    BOXES: gl.constexpr = GROUP_ROWS // BOX_ROWS  # noqa: N806 - of a group
    for number in gl.static_range(NUM_GROUPS * BOXES):
        box = rows.index(stage * NUM_GROUPS + number // BOXES).slice(number % BOXES * BOX_ROWS, BOX_ROWS)
        place = [first_row + number * BOX_ROWS, k]
        tma.async_copy_global_to_shared(x_tiles, place, arrived, box, pred=number < num_boxes)


@gluon.jit
def follow_blocks(group: gl.constexpr, block, num_blocks, buffers, NUM_STAGES: gl.constexpr):  # noqa: N803
    """What a group does in a tile that has no rows for it."""
    rows, weights, full, empty = buffers
    for number in range(num_blocks):
        stage = (block + number) % NUM_STAGES
        mbarrier.wait(full.index(stage), find_round(block + number, NUM_STAGES))
        mbarrier.arrive(empty.index(stage * NUM_GROUPS + group))


@gluon.jit
def await_lead(group: gl.constexpr, block, num_blocks, buffers, NUM_STAGES: gl.constexpr, LEAD: gl.constexpr):  # noqa: N803
    """The lower group lets the upper one go ahead."""
    rows, weights, full, empty = buffers
    if group > 0 and LEAD > 0:
        ahead = block + gl.minimum(LEAD, num_blocks) - 1
        mbarrier.wait(empty.index(ahead % NUM_STAGES * NUM_GROUPS), find_round(ahead, NUM_STAGES))


@gluon.jit
def find_round(block, NUM_STAGES: gl.constexpr):  # noqa: N803
    """The parity of a barrier's completion that belongs to this block."""
    return (block // NUM_STAGES) & 1


@gluon.jit
def await_step(queue, turn, NUM_STAGES: gl.constexpr, HAS_QUEUE: gl.constexpr):  # noqa: N803
    """How many tiles behind this one the program's next one is."""
    step = gl.num_programs(0)
    if HAS_QUEUE:
        num_taken, steps, told = queue
        slot = turn % (NUM_STAGES + 1)
        mbarrier.wait(told.index(slot), (turn // (NUM_STAGES + 1)) & 1)
        step = gl.max(steps.index(slot).load(ONE_HEARD), axis=0)
    return step


@gluon.jit
def _count_rows(expert, walk, IS_DENSE: gl.constexpr):  # noqa: N803
    counts, num_rows, num_experts, num_columns = walk
    if IS_DENSE:
        count = gl.where(expert == 0, num_rows, 0)
    else:
        count = gl.load(counts + expert, mask=expert < num_experts, other=0)
    return count


@gluon.jit
def _count_tiles(walk, TILE_N: gl.constexpr, PADDED_EXPERTS: gl.constexpr):  # noqa: N803
    """Of all experts, for one warp."""
    counts, num_rows, num_experts, num_columns = walk
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])  # noqa: N806
    experts = gl.arange(0, PADDED_EXPERTS, layout=LAYOUT)
    count = gl.load(counts + experts, mask=experts < num_experts, other=0)
    return gl.sum((count + TILE_ROWS - 1) // TILE_ROWS, axis=0) * ((num_columns + TILE_N - 1) // TILE_N)


@gluon.jit
def find_first_tile(
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
def find_next_tile(
    tile,
    step,
    walk,
    TILE_N: gl.constexpr,  # noqa: N803
    WALKED_TILES: gl.constexpr,  # noqa: N803
    IS_DENSE: gl.constexpr,  # noqa: N803
):
    expert, place, first_row, count, row, column = tile
    return _find_tile(expert, place + step, first_row, count, walk, TILE_N, WALKED_TILES, IS_DENSE)


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


@gluon.constexpr_function
def lay_out_stores(columns, dtype):
    """16 bytes a thread. Rows stay in the warp where the tensor instruction leaves them, so that nobody waits."""
    vector = 128 // dtype.primitive_bitwidth
    registers = [[0, 1 << bit] for bit in range(vector.bit_length() - 1)]
    registers += [[8, 0]] + [[0, part] for part in (32, 64, 128) if 4 * vector <= part < columns]
    if 4 * vector < 32:
        registers.append([0, 16])
    lanes = [[0, vector], [0, 2 * vector], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])
