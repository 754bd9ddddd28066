"""The loop of ``index_scores.py`` for many tokens, written out by hand for Hopper cards: 8-bit and 16-bit keys.

A program has a tile of keys, of which two warp groups have half each, in registers; one more warp copies tokens'
queries and head weights to a ring of buffers. The next token's products are under way while ReLU, weights and sums of
this one's are computed, and no group waits for the other. Rows of scores hold whole tiles of keys, so that no key of a
store is masked: with a predicate for each, ptxas computes a thread's four sums one after the other.
Invariant: a buffer is filled again only when both groups have said that their products which read it are done.

Shape letters: those of ``index_scores.py``.
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

NUM_GROUPS = gl.constexpr(2)
GROUP_KEYS = gl.constexpr(128)
BLOCK_KEYS = gl.constexpr(256)
REGISTERS = gl.constexpr((240, 24))  # a thread's: of the second group (the first gets the same) and of the copies
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
BARRIER = gl.barrier if "barrier" in vars(gl) else gl.thread_barrier  # Triton 3.7's name, 3.6's


@gluon.jit(do_not_specialize=["block_table", "num_visible", "num_tokens", "max_seq_len", "table_stride", "out_stride"])
def score_tokens_on_hopper(
    queries,
    keys,
    scales,
    weights,
    block_table,
    num_visible,
    out,
    num_tokens,
    max_seq_len,
    table_stride,
    out_stride,
    BLOCK_SIZE: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    KEY_STRIDE: gl.constexpr,  # noqa: N803
    NUMBER_BYTES: gl.constexpr,  # noqa: N803
    HAS_SCALES: gl.constexpr,  # noqa: N803
    BLOCK_TOKENS: gl.constexpr,  # noqa: N803
    NUM_STAGES: gl.constexpr,  # noqa: N803
    TURN_TOKENS: gl.constexpr,  # noqa: N803
):
    """``queries: [B T J, I]``, ``weights: [B T J]`` f32, copied a token at a time; ``out: [B, T, S]``, S a multiple of
    ``BLOCK_KEYS``. Programs: of a tile of tokens all tiles of keys, and so on."""
    HEADS: gl.constexpr = queries.block_shape[0]  # noqa: N806
    DIM: gl.constexpr = queries.block_shape[1]  # noqa: N806
    num_key_tiles = (max_seq_len + BLOCK_KEYS - 1) // BLOCK_KEYS
    num_token_tiles = (num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    first_key = gl.program_id(0) % num_key_tiles * BLOCK_KEYS
    tile = gl.program_id(0) // num_key_tiles
    request = tile // num_token_tiles
    first_row = request * num_tokens
    tokens = tile % num_token_tiles * BLOCK_TOKENS + gl.arange(0, BLOCK_TOKENS, layout=LINE)
    visible = gl.load(num_visible + first_row + tokens, mask=tokens < num_tokens, other=0)
    # The tokens that see the tile's first key, and any between them.
    start = gl.min(gl.where(visible > first_key, tokens, num_tokens), axis=0)
    stop = gl.max(gl.where(visible > first_key, tokens + 1, 0), axis=0)
    num_keys = gl.minimum(gl.max(visible, axis=0), max_seq_len)

    buffers = gl.allocate_shared_memory(queries.dtype, [NUM_STAGES, HEADS, DIM], queries.layout)
    row_weights = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, HEADS], weights.layout)
    staged_keys = gl.allocate_shared_memory(queries.dtype, [NUM_GROUPS, GROUP_KEYS, DIM], queries.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=NUM_GROUPS)
    fence_async_shared()
    BARRIER()
    if start < stop:
        cache = (keys, scales, block_table + request.to(gl.int64) * table_stride, first_key, num_keys)
        walk = (first_row + start, stop - start)
        results = (out, out_stride)
        ring = (buffers, row_weights, full, empty)
        work = (cache, staged_keys, walk, ring, results)
        gl.warp_specialize(
            [
                (_score, (0, work, BLOCK_SIZE, KEY_STRIDE, NUMBER_BYTES, HAS_SCALES, TURN_TOKENS)),
                (_score, (1, work, BLOCK_SIZE, KEY_STRIDE, NUMBER_BYTES, HAS_SCALES, TURN_TOKENS)),
                (_copy, (queries, weights, walk, ring)),
            ],
            [4, 1],
            REGISTERS,
        )


@gluon.jit
def _copy(queries, weights, walk, ring):
    buffers, row_weights, full, empty = ring
    first_row, num_rows = walk
    NUM_STAGES: gl.constexpr = buffers.shape[0]  # noqa: N806
    HEADS: gl.constexpr = buffers.shape[1]  # noqa: N806
    for place in range(num_rows):
        stage = place % NUM_STAGES
        mbarrier.wait(empty.index(stage), (place // NUM_STAGES & 1) ^ 1)  # the first turns pass at once
        mbarrier.expect(full.index(stage), queries.block_type.nbytes + weights.block_type.nbytes)
        row = (first_row + place) * HEADS
        tma.async_copy_global_to_shared(queries, [row, 0], full.index(stage), buffers.index(stage))
        tma.async_copy_global_to_shared(weights, [row], full.index(stage), row_weights.index(stage))


@gluon.jit
def _score(
    group: gl.constexpr,
    work,
    BLOCK_SIZE: gl.constexpr,  # noqa: N803
    KEY_STRIDE: gl.constexpr,  # noqa: N803
    NUMBER_BYTES: gl.constexpr,  # noqa: N803
    HAS_SCALES: gl.constexpr,  # noqa: N803
    TURN_TOKENS: gl.constexpr,  # noqa: N803
):
    """Two tokens' products at a time, each in registers of its own.

    NOTE(order): ptxas follows what is under way through some turns' worth of instructions, but not around the loop.
    A turn's last products are waited for with nothing behind them: the more tokens it has, the less often.
    Products behind the last token's are of whatever the buffers hold; nobody reads them.
    """
    cache, staged_keys, walk, ring, results = work
    buffers, row_weights, full, empty = ring
    first_row, num_rows = walk
    out, out_stride = results
    keys, scales, table, first_key, num_keys = cache
    HEADS: gl.constexpr = buffers.shape[1]  # noqa: N806
    IS_INTEGER: gl.constexpr = buffers.dtype == gl.int8  # noqa: N806
    SUM_TYPE: gl.constexpr = gl.int32 if IS_INTEGER else gl.float32  # noqa: N806
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 32 // NUMBER_BYTES])  # noqa: N806
    KEYS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCTS, k_width=4 // NUMBER_BYTES)  # noqa: N806
    HEAD_LINE: gl.constexpr = gl.SliceLayout(0, PRODUCTS)  # noqa: N806
    group_keys = first_key + group * GROUP_KEYS
    _stage_keys(keys, table, group_keys, num_keys, staged_keys.index(group), BLOCK_SIZE, KEY_STRIDE, NUMBER_BYTES)
    tile_keys = staged_keys.index(group).load(KEYS)

    positions = group_keys + gl.arange(0, GROUP_KEYS, layout=gl.SliceLayout(1, PRODUCTS))
    is_key = positions < num_keys
    scale = gl.full([GROUP_KEYS], 0.5, gl.float32, layout=gl.SliceLayout(1, PRODUCTS))
    if HAS_SCALES:
        slots = _find_slots(table, positions, is_key, BLOCK_SIZE)
        scale *= gl.load(scales + slots * (KEY_STRIDE // 4) + (KEY_STRIDE // 4 - 1))
    target = (out + positions, out_stride)

    nothing = gl.full([GROUP_KEYS, HEADS], 0, SUM_TYPE, layout=PRODUCTS)
    for turn in range((num_rows + TURN_TOKENS - 1) // TURN_TOKENS):
        place = turn * TURN_TOKENS
        products = _multiply(tile_keys, place, num_rows, ring, nothing)
        for _ in gl.static_range(TURN_TOKENS - 1):
            next_products = _multiply(tile_keys, place + 1, num_rows, ring, nothing)
            products = warpgroup_mma_wait(1, deps=[products])
            _finish(products, scale, place, walk, ring, target, HEAD_LINE)
            products = next_products
            place += 1
        products = warpgroup_mma_wait(0, deps=[products])
        _finish(products, scale, place, walk, ring, target, HEAD_LINE)


@gluon.jit
def _finish(products, scale, place, walk, ring, target, HEAD_LINE: gl.constexpr):  # noqa: N803
    """A token's ``products: [keys, J]``, which were waited for: gives its buffers back, and stores its scores."""
    buffers, row_weights, full, empty = ring
    first_row, num_rows = walk
    score_places, out_stride = target
    stage = place % buffers.shape[0]
    weights = row_weights.index(stage).load(HEAD_LINE)
    mbarrier.arrive(empty.index(stage), count=1, pred=place < num_rows)
    score = _sum_heads(products, weights, scale)
    gl.store(score_places + (first_row + place).to(gl.int64) * out_stride, score, mask=place < num_rows)


@gluon.jit
def _multiply(tile_keys, place, num_rows, ring, products):
    """``products``: whose registers the new ones take."""
    buffers, row_weights, full, empty = ring
    NUM_STAGES: gl.constexpr = buffers.shape[0]  # noqa: N806
    stage = place % NUM_STAGES
    mbarrier.wait(full.index(stage), place // NUM_STAGES & 1, pred=place < num_rows)
    return warpgroup_mma(tile_keys, buffers.index(stage).permute((1, 0)), products, use_acc=False, is_async=True)


@gluon.jit
def _sum_heads(products, weights, scale):
    """``products: [keys, J]``, ``weights: [J]``, ``scale: [keys]``, half of each key's -> [keys] f32."""
    products = products.to(gl.float32)
    # x + |x| is 2 relu(x), exactly; a maximum would take the pipe that also converts and compares, at half the speed.
    return gl.sum((products + gl.abs(products)) * gl.expand_dims(weights, 0), axis=1) * scale


@gluon.jit
def _stage_keys(
    keys,
    table,
    first_key,
    num_keys,
    staged,
    BLOCK_SIZE: gl.constexpr,  # noqa: N803
    KEY_STRIDE: gl.constexpr,  # noqa: N803
    NUMBER_BYTES: gl.constexpr,  # noqa: N803
):
    """Rows are copied in as wide parts as they are aligned to: encoded ones begin at multiples of 4 bytes."""
    DIM: gl.constexpr = staged.shape[1]  # noqa: N806
    VECTOR: gl.constexpr = 16 // NUMBER_BYTES if KEY_STRIDE * NUMBER_BYTES % 16 == 0 else 4 // NUMBER_BYTES  # noqa: N806
    LANES: gl.constexpr = 32 if DIM // VECTOR >= 32 else DIM // VECTOR  # noqa: N806
    ROWS: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [4, 1], [1, 0])  # noqa: N806
    positions = first_key + gl.arange(0, GROUP_KEYS, layout=gl.SliceLayout(1, ROWS))
    slots = _find_slots(table, positions, positions < num_keys, BLOCK_SIZE)
    columns = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(0, ROWS)), 0)
    staged.store(gl.load(keys + gl.expand_dims(slots, 1) * KEY_STRIDE + columns))
    BARRIER()


@gluon.jit
def _find_slots(table, positions, is_key, BLOCK_SIZE: gl.constexpr):  # noqa: N803
    """Whole tiles of slots: those behind the last key are the null block's, whose scores nobody gets."""
    places = positions.to(gl.uint32)  # division costs less without a sign
    blocks = gl.load(table + places // BLOCK_SIZE, mask=is_key, other=0)
    # NOTE(alignment): see index_scores.py.
    return blocks * BLOCK_SIZE + (places & (BLOCK_SIZE - 1)).to(gl.int32)
