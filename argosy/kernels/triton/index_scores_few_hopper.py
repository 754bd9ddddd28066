"""The loop of ``index_scores.py`` for few tokens, written out by hand for Hopper cards: 8-bit and 16-bit keys.

All rows' tiles lie in a line, of which a program takes one stretch; a tile is part of one block of the cache, so that
one entry of the block table finds it. Copies of the next tiles, of the next row too, are under way while a tile is
multiplied, and every warp counts the rows' tiles for itself: nothing but a buffer's turn waits for other warps.
Invariant: a buffer is filled again only behind the barrier that follows all warps' products of it.

Shape letters: those of ``index_scores.py``.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from argosy.kernels.triton.dependent_launch import IS_ON
from argosy.kernels.triton.dependent_launch_gluon import let_next_start, wait_for_inputs

FEW_KEYS = 64  # of a tile
WHOLE_BYTES = 132  # of an encoded row that can be copied as it lies
BLOCK_KEYS = gl.constexpr(FEW_KEYS)
WARPS = gl.constexpr(4)
MIN_ROWS = 32  # one for each of a warp's threads
LINE_WORDS = gl.constexpr(32)  # of a whole encoded row's numbers
TILE_LINES = gl.constexpr(66)  # of that length, in a tile of encoded rows with their scales
NO_TILE = gl.constexpr(2**31 - 1)
# What differs from step to step: it would only compile the kernel anew.
STEP_ARGUMENTS = ["block_table", "num_visible", "num_rows", "num_tokens", "max_seq_len", "table_stride", "out_stride"]
BARRIER = gl.barrier if "barrier" in vars(gl) else gl.thread_barrier  # Triton 3.7's name, 3.6's


def launch_few_on_hopper(
    query: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    out: torch.Tensor,
    max_seq_len: int,
    *,
    has_scales: bool,
    num_programs: int,
    num_stages: int,
    is_whole: bool,
) -> None:
    """``query: [B, T, J, I]``, ``keys: [num_blocks, block_size, >= I]`` of its dtype, ``scales``: its bytes as f32,
    ``out: [B, T, >= max_seq_len]`` f32; all but the table contiguous."""
    batch, num_tokens, heads, dim = query.shape
    num_rows = batch * num_tokens
    assert keys.shape[1] % FEW_KEYS == 0, keys.shape
    assert not is_whole or keys.shape[2] * keys.element_size() == WHOLE_BYTES, keys.shape
    score_few_on_hopper[(num_programs,)](
        query,
        keys,
        scales,
        weights,
        block_table,
        num_visible,
        out,
        num_rows,
        num_tokens,
        max_seq_len,
        block_table.stride(0),
        out.stride(1),
        BLOCK_SIZE=keys.shape[1],
        KEY_STRIDE=keys.shape[2],
        NUMBER_BYTES=query.element_size(),
        HAS_SCALES=has_scales,
        HEADS=heads,
        DIM=dim,
        NUM_ROWS=max(MIN_ROWS, 1 << (num_rows - 1).bit_length()),
        NUM_STAGES=num_stages,
        IS_WHOLE=is_whole,
        num_warps=4,
        launch_pdl=IS_ON,
    )


@gluon.jit(do_not_specialize=STEP_ARGUMENTS)
def score_few_on_hopper(
    query,
    keys,
    scales,
    weights,
    block_table,
    num_visible,
    out,
    num_rows,
    num_tokens,
    max_seq_len,
    table_stride,
    out_stride,
    BLOCK_SIZE: gl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    KEY_STRIDE: gl.constexpr,  # noqa: N803
    NUMBER_BYTES: gl.constexpr,  # noqa: N803
    HAS_SCALES: gl.constexpr,  # noqa: N803
    HEADS: gl.constexpr,  # noqa: N803
    DIM: gl.constexpr,  # noqa: N803
    NUM_ROWS: gl.constexpr,  # noqa: N803
    NUM_STAGES: gl.constexpr,  # noqa: N803
    IS_WHOLE: gl.constexpr,  # noqa: N803
):
    """``query: [B T, J, I]``, ``weights: [B T, J]`` f32, ``out: [B T, out_stride]``; ``BLOCK_SIZE``: a multiple of
    ``BLOCK_KEYS``."""
    QUERY: gl.constexpr = _lines_of(16 // NUMBER_BYTES, DIM)  # noqa: N806
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 32 // NUMBER_BYTES])  # noqa: N806
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 8 * NUMBER_BYTES, 2)  # noqa: N806
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=PRODUCTS, k_width=4 // NUMBER_BYTES)  # noqa: N806
    WHOLE_ROWS: gl.constexpr = _whole_rows(DIM, 4)  # noqa: N806
    WHOLE_SCALES: gl.constexpr = _whole_rows(1, LINE_WORDS)  # noqa: N806
    SUM_TYPE: gl.constexpr = gl.int32 if query.dtype.element_ty == gl.int8 else gl.float32  # noqa: N806
    let_next_start()
    wait_for_inputs()
    behind = _count_tiles(num_visible, num_rows, max_seq_len, NUM_ROWS)
    start, stop = _share_tiles(behind)
    if start == stop:
        return

    row_query = gl.allocate_shared_memory(query.dtype.element_ty, [HEADS, DIM], SHARED)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # noqa: N806
    if IS_WHOLE:
        tiles = gl.allocate_shared_memory(gl.float32, [NUM_STAGES * TILE_LINES, LINE_WORDS], LINE)
        tile_scales = tiles
    else:
        tiles = gl.allocate_shared_memory(query.dtype.element_ty, [NUM_STAGES, BLOCK_KEYS, DIM], SHARED)
        tile_scales = gl.allocate_shared_memory(gl.float32, [NUM_STAGES, BLOCK_KEYS], LINE)
    cache = (keys, scales, tiles, tile_scales)
    table = (block_table, table_stride, num_tokens, behind, stop)

    # All entries of the table are asked for before the first is waited for.
    cursor = (block_table + (start - start).to(gl.int64), start, start)
    places = ()
    for ahead in gl.static_range(NUM_STAGES):
        cursor, place = _find_tile(table, cursor, start + ahead, BLOCK_SIZE)
        places = places + (place,)
    for ahead in gl.static_range(NUM_STAGES - 1):
        _copy_tile(
            cache,
            ahead,
            places[ahead],
            start + ahead < stop,
            BLOCK_SIZE,
            KEY_STRIDE,
            NUMBER_BYTES,
            HAS_SCALES,
            IS_WHOLE,
        )
    place = places[NUM_STAGES - 1]

    heads = gl.arange(0, HEADS, layout=gl.SliceLayout(1, QUERY))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, QUERY))
    query_places = gl.expand_dims(heads, 1) * DIM + gl.expand_dims(dims, 0)
    columns = gl.arange(0, HEADS, layout=gl.SliceLayout(0, PRODUCTS))
    tile_keys = gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(1, PRODUCTS))
    if IS_WHOLE:
        tile_keys = (tile_keys & 7) * 4 + (tile_keys // 8 & 3) + tile_keys // 32 * 32
    nothing = gl.full([BLOCK_KEYS, HEADS], 0, SUM_TYPE, layout=PRODUCTS)
    tile = start
    stage = start - start  # of this tile
    free = stage + (NUM_STAGES - 1)
    while tile < stop:
        row, row_start, row_stop = _find_row(behind, tile)
        values = gl.load(query + row.to(gl.int64) * (HEADS * DIM) + query_places)
        row_weights = gl.load(weights + row * HEADS + columns)
        num_keys = gl.minimum(gl.load(num_visible + row), max_seq_len)
        target = out + row.to(gl.int64) * out_stride
        BARRIER()  # for the row before
        row_query.store(values)
        fence_async_shared()
        row_stop = gl.minimum(row_stop, stop)
        while tile < row_stop:
            async_copy.wait_group(NUM_STAGES - 2)
            BARRIER()
            if not IS_WHOLE:
                fence_async_shared()
            if IS_WHOLE:
                lines = tiles.index(stage * TILE_LINES)
                operand = lines._reinterpret(query.dtype.element_ty, [BLOCK_KEYS, DIM], WHOLE_ROWS).load(OPERAND)
            else:
                operand = tiles.index(stage)
            products = warpgroup_mma(operand, row_query.permute((1, 0)), nothing, use_acc=False, is_async=True)
            copied = tile + (NUM_STAGES - 1)
            _copy_tile(cache, free, place, copied < stop, BLOCK_SIZE, KEY_STRIDE, NUMBER_BYTES, HAS_SCALES, IS_WHOLE)
            cursor, place = _find_tile(table, cursor, copied + 1, BLOCK_SIZE)
            products = warpgroup_mma_wait(0, deps=[products])
            score = _sum_heads(products, row_weights)
            if IS_WHOLE:
                lines = tiles.index(stage * TILE_LINES + 1)
                score *= lines._reinterpret(gl.float32, [BLOCK_KEYS], WHOLE_SCALES).load(gl.SliceLayout(1, PRODUCTS))
            elif HAS_SCALES:
                score *= tile_scales.index(stage).load(gl.SliceLayout(1, PRODUCTS))
            positions = (tile - row_start) * BLOCK_KEYS + tile_keys
            gl.store(target + positions, score, mask=positions < num_keys)
            tile += 1
            free = stage
            stage = gl.where(stage == NUM_STAGES - 1, 0, stage + 1)
    async_copy.wait_group(0)


@gluon.constexpr_function
def _lines_of(vector, dim):
    """Rows of ``dim`` numbers, of which a thread has ``vector`` at once."""
    lanes = min(32, dim // vector)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _count_tiles(num_visible, num_rows, max_seq_len, NUM_ROWS: gl.constexpr):  # noqa: N803
    """Tiles of each row and those before it: [NUM_ROWS], all of it in each warp."""
    ROWS: gl.constexpr = gl.BlockedLayout([NUM_ROWS // 32], [32], [WARPS], [0])  # noqa: N806
    rows = gl.arange(0, NUM_ROWS, layout=ROWS)
    visible = gl.load(num_visible + rows, mask=rows < num_rows, other=0)
    visible = gl.maximum(gl.minimum(visible, max_seq_len), 0)
    return gl.associative_scan((visible + (BLOCK_KEYS - 1)) // BLOCK_KEYS, 0, _add)


@gluon.jit
def _share_tiles(behind):
    """The first tile of this program, and the one behind its last."""
    total = gl.max(behind, axis=0)
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    share = total // programs
    rest = total - share * programs
    start = program * share + gl.minimum(program, rest)
    stop = (program + 1) * share + gl.minimum(program + 1, rest)
    return start, stop


@gluon.jit
def _find_row(behind, tile):
    """The row of a tile, its first tile, and the one behind its last."""
    is_before = behind <= tile
    row = gl.sum(is_before.to(gl.int32), axis=0)
    row_start = gl.max(gl.where(is_before, behind, 0), axis=0)
    row_stop = gl.min(gl.where(is_before, NO_TILE, behind), axis=0)
    return row, row_start, row_stop


@gluon.jit
def _find_tile(table, cursor, tile, BLOCK_SIZE: gl.constexpr):  # noqa: N803
    """The tile's block, the sum of what a warp's threads have, and the place of the tile's first key in that block.
    ``cursor``: of the tile before it, the row's entries in the table, first tile, and the one behind its last.

    NOTE(order): what all threads load alike goes to a register of the whole warp at once, and so is waited for.
    """
    block_table, table_stride, num_tokens, behind, stop = table
    entries, row_start, row_stop = cursor
    TILES: gl.constexpr = BLOCK_SIZE // BLOCK_KEYS  # noqa: N806 - of a block
    if tile >= row_stop:
        row, row_start, row_stop = _find_row(behind, tile)
        entries = block_table + (row // num_tokens).to(gl.int64) * table_stride
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    place = (tile - row_start).to(gl.uint32)  # division costs less without a sign
    blocks = gl.load(entries + (place // TILES + lanes), mask=(lanes == 0) & (tile < stop), other=0)
    return (entries, row_start, row_stop), (blocks, (place % TILES).to(gl.int32) * BLOCK_KEYS)


@gluon.jit
def _copy_tile(
    cache,
    stage,
    place,
    is_tile,
    BLOCK_SIZE: gl.constexpr,  # noqa: N803
    KEY_STRIDE: gl.constexpr,  # noqa: N803
    NUMBER_BYTES: gl.constexpr,  # noqa: N803
    HAS_SCALES: gl.constexpr,  # noqa: N803
    IS_WHOLE: gl.constexpr,  # noqa: N803
):
    """Begins the copies of the keys of a tile; a group of copies even where there is none to copy. Rows are
    copied in as wide parts as they are aligned to: encoded ones begin at multiples of 4 bytes."""
    keys, scales, tiles, tile_scales = cache
    DIM: gl.constexpr = KEY_STRIDE // 16 * 16  # noqa: N806
    VECTOR: gl.constexpr = 16 // NUMBER_BYTES if KEY_STRIDE * NUMBER_BYTES % 16 == 0 else 4 // NUMBER_BYTES  # noqa: N806
    KEYS: gl.constexpr = _lines_of(VECTOR, DIM)  # noqa: N806
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])  # noqa: N806
    if is_tile:
        blocks, first_key = place
        slot = gl.sum(blocks, axis=0) * BLOCK_SIZE + first_key
        if IS_WHOLE:
            _copy_words(tiles, scales + slot * (KEY_STRIDE // 4), stage)
        else:
            tile_keys = gl.expand_dims(gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(1, KEYS)), 1)
            dims = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(0, KEYS)), 0)
            places = keys + slot * KEY_STRIDE + (tile_keys * KEY_STRIDE + dims)
            async_copy.async_copy_global_to_shared(tiles.index(stage), places)
        if HAS_SCALES and not IS_WHOLE:
            places = scales + slot * (KEY_STRIDE // 4) + (KEY_STRIDE // 4 - 1)
            places += gl.arange(0, BLOCK_KEYS, layout=LINE) * (KEY_STRIDE // 4)
            async_copy.async_copy_global_to_shared(tile_scales.index(stage), places)
    async_copy.commit_group()


@gluon.jit
def _copy_words(tiles, source, stage):
    """A tile of encoded rows as it lies in the cache: 64 rows of 33 words begin at a multiple of 16 bytes."""
    WORDS: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])  # noqa: N806
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])  # noqa: N806
    MOST: gl.constexpr = BLOCK_KEYS * LINE_WORDS  # noqa: N806 - a power of two
    words = gl.arange(0, MOST, layout=WORDS)
    first = stage * TILE_LINES
    async_copy.async_copy_global_to_shared(tiles.index(first)._reinterpret(gl.float32, [MOST], LINE), source + words)
    words = gl.arange(0, 2 * LINE_WORDS, layout=WORDS)
    rest = tiles.index(first + BLOCK_KEYS)._reinterpret(gl.float32, [2 * LINE_WORDS], LINE)
    async_copy.async_copy_global_to_shared(rest, source + (MOST + words))


@gluon.constexpr_function
def _whole_rows(vector, padding):
    """Of shared memory: 64 rows of ``vector`` numbers, with ``padding`` behind each, of which every fourth one follows
    in the tensor instruction's order: what eight threads read at once lies in banks of its own."""
    columns = [[0, 1 << bit] for bit in range((vector - 1).bit_length())]
    rows = [[place, 0] for place in (8, 16, 1, 2, 4, 32)]
    if vector == 1:
        return gl.PaddedSharedLayout([[1, padding]], [[place] for place, _ in rows], [], [64])
    return gl.PaddedSharedLayout([[vector, padding]], columns + rows, [], [64, vector])


@gluon.jit
def _sum_heads(products, row_weights):
    """``products: [keys, J]``, ``row_weights: [J]`` -> [keys] f32."""
    products = products.to(gl.float32)
    # x + |x| is 2 relu(x), exactly; a maximum would take the pipe that also converts and compares, at half the speed.
    return gl.sum((products + gl.abs(products)) * gl.expand_dims(row_weights * 0.5, 0), axis=1)
