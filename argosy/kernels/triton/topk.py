"""A row's highest scores, those of ``reference.select_topk_slots``: their cache slots in order of position, or bits.

A program holds a row's scores in registers, finds the lowest chosen one (``topk_search.py``) and places the chosen. Of
a row that fills a quarter or a half of that, it holds no more. Longer rows are first thinned: of each ``CHUNK`` scores
the best ``topk`` go on, which no score among the row's best fails to be. Invariant: what lies behind ``num_visible``
decides nothing; NaN counts as infinity.

Shape letters: N rows, S scores of a row. A program's scores: [32 lanes, lines, 4].
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.card import count_multiprocessors
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs
from argosy.kernels.triton.topk_search import LANES, LINE, VECTOR, count_before, find_lowest, load_scores, place_vectors


@dataclass(frozen=True, slots=True)
class Tile:
    num_warps: int  # each holds a line of 128 scores at least
    max_registers: int | None = None  # of a thread


# What one program holds. Neither number is measured yet.
MAX_BLOCK = 32768
CHUNK = 16384
# By the scores that a program holds: few programs, whose latency counts, and many, of which several share a
# multiprocessor. Of 4,120 scores on an H200, room for 8,192: 64 rows in 8 warps 9.1 us, in 16 10.2, in 4 9.8; 128 rows
# 9.7, 11.0 and 10.3. The others were not measured against any.
TILES = (
    (512, Tile(1), Tile(1)),
    (2048, Tile(4), Tile(4)),
    (4096, Tile(8), Tile(4, 64)),
    (8192, Tile(8), Tile(8, 64)),
    (CHUNK, Tile(16), Tile(16, 64)),
    (MAX_BLOCK, Tile(32), Tile(32)),
)
VECTOR_WORDS = 4  # rows of a mask begin where 16 bytes can be read at once
COPIED: tl.constexpr = tl.constexpr(1024)  # scores of a short row at a time
WORD_BITS: tl.constexpr = tl.constexpr(32)
LINE_WORDS: tl.constexpr = tl.constexpr(4)
MARKED: tl.constexpr = tl.constexpr(128)  # words of a mask at a time, where nothing is searched


def select_topk_slots(
    scores: torch.Tensor,
    num_visible: torch.Tensor,
    topk: int,
    block_table: torch.Tensor,
    block_size: int,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``scores: [N, S]`` f32, rows may be strided, ``num_visible: [N]`` int, ``block_table: [N or 1, blocks]`` int32
    -> [N, topk] int64, -1 where there are fewer. ``topk`` at most half of ``CHUNK``, ``block_size`` a multiple of 4;
    ``tile`` is for measurements. No host sync.

    The set is ``reference.select_topk_slots``'s; here it is in order of position.
    """
    num_rows, width = scores.shape
    slots = torch.empty(num_rows, topk, dtype=torch.int64, device=scores.device)
    if num_rows == 0:
        return slots
    assert 0 < topk <= CHUNK // 2, f"topk ({topk}) must be in 1..{CHUNK // 2}"
    assert block_size % VECTOR.value == 0, f"block_size ({block_size}) must be a multiple of {VECTOR.value}"
    positions = None
    while width > MAX_BLOCK:
        num_chunks = -(-width // CHUNK)
        kept_scores = scores.new_empty(num_rows, num_chunks * topk)
        kept_positions = torch.empty_like(kept_scores, dtype=torch.int32)
        num_kept = torch.empty(num_rows, dtype=torch.int32, device=scores.device)
        kept = (kept_scores, kept_positions, num_kept)
        _launch(scores, positions, num_visible, kept, slots, block_table, block_size, CHUNK, tile)
        scores, positions, num_visible = kept
        width = scores.shape[1]
    _launch(scores, positions, num_visible, None, slots, block_table, block_size, _block_of(width), tile)
    return slots


def select_topk_mask(
    scores: torch.Tensor, num_visible: torch.Tensor, topk: int, *, tile: Tile | None = None
) -> torch.Tensor:
    """``scores: [N, S]`` f32, rows may be strided, ``num_visible: [N]`` int -> [N, ceil(S / 32)] int32 bits, those of
    ``reference.select_topk_mask``; rows begin at whole vectors. S at most ``MAX_BLOCK``. No host sync.
    """
    num_rows, width = scores.shape
    num_words = -(-width // WORD_BITS.value)
    stride = -(-num_words // VECTOR_WORDS) * VECTOR_WORDS
    mask = torch.empty(num_rows, stride, dtype=torch.int32, device=scores.device)
    if mask.numel() > 0:
        assert 0 < topk <= CHUNK // 2, f"topk ({topk}) must be in 1..{CHUNK // 2}"
        assert width <= MAX_BLOCK, f"a mask is for rows of at most {MAX_BLOCK} scores, not {width}"
        block = _block_of(width)
        tile = tile or _choose_tile(scores, num_rows, block)
        _mask_kernel[(num_rows,)](
            scores,
            num_visible,
            mask,
            width,
            scores.stride(0),
            stride,
            TOPK=topk,
            BLOCK=block,
            WARPS=tile.num_warps,
            READ=16 if scores.stride(0) % 16 == 0 else 1,
            num_warps=tile.num_warps,
            maxnreg=tile.max_registers,
        )
    return mask[:, :num_words]


def _block_of(width: int) -> int:
    block: int = triton.next_power_of_2(width)
    return max(LINE.value, block)


def _choose_tile(scores: torch.Tensor, num_programs: int, block: int) -> Tile:
    is_few = not scores.is_cuda or num_programs < 2 * count_multiprocessors(scores.device.index)
    few, many = next(tiles for limit, *tiles in TILES if block <= limit)
    return few if is_few else many


def _launch(
    scores: torch.Tensor,
    positions: torch.Tensor | None,
    num_visible: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    block: int,
    tile: Tile | None,
) -> None:
    """``kept``: scores, positions and counts of what goes on; None chooses the slots."""
    num_rows, topk = slots.shape
    kept_scores, kept_positions, num_kept = kept or (scores, slots, num_visible)  # a launch needs pointers
    grid = (num_rows, -(-scores.shape[1] // block) if kept else 1)
    tile = tile or _choose_tile(scores, grid[0] * grid[1], block)
    _select_kernel[grid](
        scores,
        scores if positions is None else positions,
        num_visible,
        kept_scores,
        kept_positions,
        num_kept,
        slots,
        block_table,
        scores.shape[1],
        scores.stride(0),
        kept_scores.stride(0),
        block_table.stride(0) if block_table.shape[0] > 1 else 0,
        TOPK=topk,
        BLOCK_SIZE=block_size,
        HAS_POSITIONS=positions is not None,
        IS_LAST=kept is None,
        BLOCK=block,
        WARPS=tile.num_warps,
        READ=16 if scores.stride(0) % 16 == 0 else 1,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        launch_pdl=IS_ON,
    )


@triton.jit(do_not_specialize=["num_visible", "block_table", "width", "table_stride"])
def _select_kernel(
    scores,
    positions,
    num_visible,
    kept_scores,
    kept_positions,
    num_kept,
    slots,
    block_table,
    width,
    row_stride,
    kept_stride,
    table_stride,
    TOPK: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    HAS_POSITIONS: tl.constexpr,  # noqa: N803
    IS_LAST: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WARPS: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
):
    """Rows of at most one block are done with here, and -1 tells the launches behind so."""
    let_next_start()
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    num_in_row = tl.minimum(tl.load(num_visible + row).to(tl.int32), width)
    is_done_with = num_in_row <= BLOCK
    if not IS_LAST:
        total = num_in_row // BLOCK * TOPK + tl.minimum(num_in_row % BLOCK, TOPK)
        tl.store(num_kept + row, tl.where(is_done_with, -1, total), mask=start == 0)
    if (num_in_row <= start) & (start > 0) | (num_in_row < 0):
        return

    num_scores = tl.minimum(num_in_row - start, BLOCK)
    place = row * row_stride + start
    kept_place = row * kept_stride + tl.program_id(1) * TOPK
    source = (scores + place, positions + place, start, num_scores)
    kept = (kept_scores + kept_place, kept_positions + kept_place)
    target = (slots + row * TOPK, block_table + row * table_stride)
    is_last = is_done_with | IS_LAST
    HALF: tl.constexpr = _half(BLOCK, WARPS)  # noqa: N806
    QUARTER: tl.constexpr = _half(HALF, WARPS)  # noqa: N806
    if num_scores <= TOPK:
        _take_all(source, kept, target, is_last, TOPK, BLOCK_SIZE, HAS_POSITIONS, IS_LAST)
    elif (QUARTER < HALF) & (num_scores <= QUARTER):
        _take_best(source, kept, target, is_last, TOPK, BLOCK_SIZE, HAS_POSITIONS, IS_LAST, QUARTER, WARPS, READ)
    elif (HALF < BLOCK) & (num_scores <= HALF):
        _take_best(source, kept, target, is_last, TOPK, BLOCK_SIZE, HAS_POSITIONS, IS_LAST, HALF, WARPS, READ)
    else:
        _take_best(source, kept, target, is_last, TOPK, BLOCK_SIZE, HAS_POSITIONS, IS_LAST, BLOCK, WARPS, READ)


@triton.constexpr_function
def _half(block, num_warps):
    """What is left of a block where every warp still holds a line of it."""
    return block // 2 if block >= 2 * num_warps * LINE.value else block


@triton.jit
def _take_all(
    source,
    kept,
    target,
    is_last,
    TOPK: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    HAS_POSITIONS: tl.constexpr,  # noqa: N803
    IS_LAST: tl.constexpr,  # noqa: N803
):
    first, first_position, start, num_scores = source
    for copied in tl.range(0, TOPK, COPIED):
        places = copied + tl.arange(0, COPIED)
        is_score = places < num_scores
        position = start + places
        if HAS_POSITIONS:
            position = tl.load(first_position + places, mask=is_score, other=0)
        if is_last:
            slots, table = target
            block = tl.load(table + position // BLOCK_SIZE, mask=is_score, other=0).to(tl.int64)
            slot = tl.where(is_score, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
            tl.store(slots + places, slot, mask=places < TOPK)
        elif not IS_LAST:
            kept_scores, kept_positions = kept
            tl.store(kept_scores + places, tl.load(first + places, mask=is_score), mask=is_score)
            tl.store(kept_positions + places, position, mask=is_score)


@triton.jit
def _take_best(
    source,
    kept,
    target,
    is_last,
    TOPK: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    HAS_POSITIONS: tl.constexpr,  # noqa: N803
    IS_LAST: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WARPS: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
):
    """Of more than TOPK scores."""
    first, first_position, start, num_scores = source
    vectors = place_vectors(BLOCK)
    places = vectors + tl.arange(0, VECTOR)
    values = load_scores(first, places, num_scores, READ)
    values, lowest = find_lowest(values, places, num_scores, TOPK, WARPS)
    is_chosen = values >= lowest
    if is_last:
        slots, table = target
        if HAS_POSITIONS:
            position = tl.load(first_position + places, mask=is_chosen, other=0)
            block = tl.load(table + position // BLOCK_SIZE, mask=is_chosen, other=0)
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        else:
            block = tl.load(table + (start + vectors) // BLOCK_SIZE, mask=vectors < num_scores, other=0)
            slot = block * BLOCK_SIZE + (start + vectors) % BLOCK_SIZE + tl.arange(0, VECTOR)
        # No card holds 2^31 rows, so that the upper halves are zeros.
        tl.store(slots + count_before(is_chosen), slot.to(tl.uint32).to(tl.int64), mask=is_chosen)
    elif not IS_LAST:
        kept_scores, kept_positions = kept
        position = start + places
        if HAS_POSITIONS:
            position = tl.load(first_position + places, mask=is_chosen, other=0)
        to = count_before(is_chosen)
        tl.store(kept_scores + to, values, mask=is_chosen)
        tl.store(kept_positions + to, position, mask=is_chosen)


@triton.jit(do_not_specialize=["num_visible", "width", "mask_stride"])
def _mask_kernel(
    scores,
    num_visible,
    mask,
    width,
    row_stride,
    mask_stride,
    TOPK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WARPS: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
):
    """A row's bits, of all words up to ``mask_stride``."""
    row = tl.program_id(0).to(tl.int64)
    num_scores = tl.minimum(tl.load(num_visible + row).to(tl.int32), width)
    first = scores + row * row_stride
    words = mask + row * mask_stride
    HALF: tl.constexpr = _half(BLOCK, WARPS)  # noqa: N806
    QUARTER: tl.constexpr = _half(HALF, WARPS)  # noqa: N806
    num_written = num_scores * 0
    if num_scores > TOPK:
        if (QUARTER < HALF) & (num_scores <= QUARTER):
            _mark_best(first, num_scores, words, mask_stride, TOPK, QUARTER, WARPS, READ)
            num_written += QUARTER // WORD_BITS
        elif (HALF < BLOCK) & (num_scores <= HALF):
            _mark_best(first, num_scores, words, mask_stride, TOPK, HALF, WARPS, READ)
            num_written += HALF // WORD_BITS
        else:
            _mark_best(first, num_scores, words, mask_stride, TOPK, BLOCK, WARPS, READ)
            num_written += BLOCK // WORD_BITS
    for written in tl.range(num_written, mask_stride, MARKED):
        places = written + tl.arange(0, MARKED)
        num_bits = tl.minimum(tl.maximum(num_scores - places * WORD_BITS, 0), WORD_BITS)
        # A shift by all of a word's bits would not be defined.
        bits = tl.where(num_bits == WORD_BITS, -1, (1 << (num_bits % WORD_BITS)) - 1)
        tl.store(words + places, tl.where(num_scores <= TOPK, bits, 0), mask=places < mask_stride)


@triton.jit
def _mark_best(
    first,
    num_scores,
    words,
    mask_stride,
    TOPK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WARPS: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
):
    """Of more than TOPK scores."""
    places = place_vectors(BLOCK) + tl.arange(0, VECTOR)
    values = load_scores(first, places, num_scores, READ)
    values, lowest = find_lowest(values, places, num_scores, TOPK, WARPS)
    bits = tl.sum((values >= lowest).to(tl.int32) << tl.arange(0, VECTOR), 2)  # [LANES, lines]
    bits <<= (tl.arange(0, LANES) * VECTOR % WORD_BITS)[:, None]
    bits = tl.reshape(bits, (LINE_WORDS, LANES // LINE_WORDS, BLOCK // LINE))
    to = tl.arange(0, BLOCK // LINE)[None, :] * LINE_WORDS + tl.arange(0, LINE_WORDS)[:, None]
    tl.store(words + to, tl.sum(bits, 1), mask=to < mask_stride)
