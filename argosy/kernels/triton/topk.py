"""A row's highest scores, those of ``reference.select_topk_slots``: their cache slots in order of position, or bits.

A program holds a row's scores in registers and narrows down, by counting, the interval where the lowest chosen score
lies: where the counts at both ends say, in the middle, or in the middle of the float32 numbers, each where the one
before did not help. Longer rows are first thinned: of each ``CHUNK`` scores the best ``topk`` go on, which no score
among the row's best fails to be. Invariant: what lies behind ``num_visible`` decides nothing.

Shape letters: N rows, S scores of a row.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.card import count_multiprocessors

# What one program holds: 32 scores a thread. Neither number is measured yet.
MAX_BLOCK = 32768
CHUNK = 16384
MIN_BLOCK = 64
# By the scores that a program holds: warps of few rows, which wait for one another, and of many. Not measured yet.
WARPS = ((1024, 4, 4), (4096, 16, 8), (8192, 16, 16), (MAX_BLOCK, 32, 32))
# Scores that are placed at a time, at least one for each thread.
PLACED = 4096
WORD_BITS: tl.constexpr = tl.constexpr(32)
VECTOR_WORDS = 4  # rows of a mask begin where 16 bytes can be read at once

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
HIGHEST: tl.constexpr = tl.constexpr(2**31 - 1)


def select_topk_slots(
    scores: torch.Tensor, num_visible: torch.Tensor, topk: int, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """``scores: [N, S]`` f32, rows may be strided, ``num_visible: [N]`` int, ``block_table: [N or 1, blocks]`` int32
    -> [N, topk] int64, -1 where there are fewer. ``topk`` at most half of ``CHUNK``. No host sync.

    The set is ``reference.select_topk_slots``'s; here it is in order of position.
    """
    num_rows, width = scores.shape
    slots = torch.empty(num_rows, topk, dtype=torch.int64, device=scores.device)
    if num_rows == 0:
        return slots
    assert 0 < topk <= CHUNK // 2, f"topk ({topk}) must be in 1..{CHUNK // 2}"
    positions = None
    while width > MAX_BLOCK:
        num_chunks = -(-width // CHUNK)
        kept_scores = scores.new_empty(num_rows, num_chunks * topk)
        kept_positions = torch.empty_like(kept_scores, dtype=torch.int32)
        num_kept = torch.empty(num_rows, dtype=torch.int32, device=scores.device)
        kept = (kept_scores, kept_positions, num_kept)
        _launch(scores, positions, num_visible, kept, slots, block_table, block_size, CHUNK)
        scores, positions, num_visible = kept
        width = scores.shape[1]
    block = max(MIN_BLOCK, triton.next_power_of_2(width))
    _launch(scores, positions, num_visible, None, slots, block_table, block_size, block)
    return slots


def select_topk_mask(scores: torch.Tensor, num_visible: torch.Tensor, topk: int) -> torch.Tensor:
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
        block = max(MIN_BLOCK, triton.next_power_of_2(width))
        _mask_kernel[(num_rows,)](
            scores,
            num_visible,
            mask,
            width,
            scores.stride(0),
            stride,
            TOPK=topk,
            BLOCK=block,
            PLACED=min(block, PLACED),
            READ=16 if scores.stride(0) % 16 == 0 else 1,
            num_warps=_choose_warps(scores, block),
        )
    return mask[:, :num_words]


def _choose_warps(scores: torch.Tensor, block: int) -> int:
    is_few = not scores.is_cuda or scores.shape[0] < 2 * count_multiprocessors(scores.device.index)
    few_warps, many_warps = next(warps for limit, *warps in WARPS if block <= limit)
    return few_warps if is_few else many_warps


def _launch(
    scores: torch.Tensor,
    positions: torch.Tensor | None,
    num_visible: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    block: int,
) -> None:
    """``kept``: scores, positions and counts of what goes on; None chooses the slots."""
    num_rows, topk = slots.shape
    kept_scores, kept_positions, num_kept = kept or (scores, slots, num_visible)  # a launch needs pointers
    _select_kernel[(num_rows, -(-scores.shape[1] // block) if kept else 1)](
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
        PLACED=min(block, PLACED),
        READ=16 if scores.stride(0) % 16 == 0 else 1,
        num_warps=_choose_warps(scores, block),
    )


@triton.jit
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
    PLACED: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
):
    """Rows of at most one block are done with here, and -1 tells the launches behind so.

    Scores are read READ at a time, where that stays inside the row's own memory; those behind the last count nothing.
    """
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
    first = scores + row * row_stride + start
    lowest, num_ties = num_scores * 0 + LOWEST, num_scores * 0 + TOPK
    if num_scores > TOPK:
        if num_scores <= BLOCK // 4:
            lowest, num_ties = _find_lowest(first, num_scores, TOPK, BLOCK // 4, READ)
        else:
            lowest, num_ties = _find_lowest(first, num_scores, TOPK, BLOCK, READ)

    num_greater = num_scores * 0  # so far
    num_equal = num_scores * 0
    for placed in tl.range(0, num_scores, PLACED):
        places = placed + tl.arange(0, PLACED)
        is_score = places < num_scores
        values = _load(first, places, num_scores, READ)
        keys = _order(values)
        is_greater = is_score & (keys > lowest)
        is_equal = is_score & (keys == lowest)
        both = is_greater.to(tl.int32) + (is_equal.to(tl.int32) << 16)
        count = tl.cumsum(both)
        greater, equal = num_greater + (count & 0xFFFF), num_equal + (count >> 16)
        is_chosen = is_greater | (is_equal & (equal <= num_ties))
        to = greater + tl.minimum(equal, num_ties) - 1
        total = tl.sum(both)
        num_greater += total & 0xFFFF
        num_equal += total >> 16
        position = start + places
        if HAS_POSITIONS:
            position = tl.load(positions + row * row_stride + position, mask=is_chosen, other=0)
        if IS_LAST | is_done_with:
            blocks = block_table + row * table_stride + position // BLOCK_SIZE
            block = tl.load(blocks, mask=is_chosen, other=0).to(tl.int64)
            tl.store(slots + row * TOPK + to, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=is_chosen)
        else:
            kept = row * kept_stride + tl.program_id(1) * TOPK + to
            tl.store(kept_scores + kept, values, mask=is_chosen)
            tl.store(kept_positions + kept, position, mask=is_chosen)

    if (IS_LAST | is_done_with) & (num_scores < TOPK):
        for place in tl.range(0, TOPK, PLACED):
            places = place + tl.arange(0, PLACED)
            missing = tl.full((PLACED,), -1, tl.int64)
            tl.store(slots + row * TOPK + places, missing, mask=(places >= num_scores) & (places < TOPK))


@triton.jit(do_not_specialize=["width", "mask_stride"])
def _mask_kernel(
    scores,
    num_visible,
    mask,
    width,
    row_stride,
    mask_stride,
    TOPK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    PLACED: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
):
    """A row's bits, of all words up to ``mask_stride``."""
    row = tl.program_id(0).to(tl.int64)
    num_scores = tl.minimum(tl.load(num_visible + row).to(tl.int32), width)
    first = scores + row * row_stride
    lowest, num_ties = num_scores * 0 + LOWEST, num_scores * 0 + TOPK
    if num_scores > TOPK:
        if num_scores <= BLOCK // 4:
            lowest, num_ties = _find_lowest(first, num_scores, TOPK, BLOCK // 4, READ)
        else:
            lowest, num_ties = _find_lowest(first, num_scores, TOPK, BLOCK, READ)

    NUM_WORDS: tl.constexpr = PLACED // WORD_BITS  # noqa: N806
    num_equal = num_scores * 0  # so far
    for placed in tl.range(0, mask_stride * WORD_BITS, PLACED):
        places = placed + tl.arange(0, PLACED)
        keys = _order(_load(first, places, num_scores, READ))
        is_equal = keys == lowest
        if num_scores <= TOPK:
            is_chosen = places < num_scores
        else:
            equal = (is_equal & (places < num_scores)).to(tl.int32)
            is_chosen = (keys > lowest) | (is_equal & (num_equal + tl.cumsum(equal) <= num_ties))
            is_chosen &= places < num_scores
            num_equal += tl.sum(equal)
        bits = tl.reshape(is_chosen.to(tl.int32) << (places % WORD_BITS), (NUM_WORDS, WORD_BITS))
        words = placed // WORD_BITS + tl.arange(0, NUM_WORDS)
        tl.store(mask + row * mask_stride + words, tl.sum(bits, 1), mask=words < mask_stride)


@triton.jit
def _find_lowest(
    first,
    num_scores,
    TOPK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
):
    """The key of the TOPK-th of more scores, and how many of those that equal it are chosen.

    At every turn: at least TOPK keys (``above_low``) are >= low, fewer (``above_high``) are > high.
    """
    places = tl.arange(0, BLOCK)
    is_score = places < num_scores
    keys = _order(_load(first, places, num_scores, READ))
    low = tl.min(tl.where(is_score, keys, HIGHEST))
    keys = tl.where(is_score, keys, LOWEST)
    high = tl.max(keys)
    above_low, above_high = num_scores, num_scores * 0
    way = num_scores * 0
    is_stuck = low < LOWEST
    while low < high:
        if is_stuck:  # ties, often: shrink the interval to the keys in it
            low, high = tl.min(tl.where(keys >= low, keys, HIGHEST)), tl.max(tl.where(keys <= high, keys, LOWEST))
        num_inside = above_low - above_high
        share = tl.where(way == 0, (TOPK - above_high).to(tl.float32) / num_inside.to(tl.float32), 0.5)
        low_value, high_value = _value(low), _value(high)
        # An infinity makes it NaN, which is clamped like any other.
        middle = _order(high_value - (high_value - low_value) * share)
        middle = tl.where(way == 2, (low | high) - ((low ^ high) >> 1), middle)
        middle = tl.minimum(tl.maximum(middle, tl.minimum(low, HIGHEST - 1) + 1), high)
        count = tl.sum((keys >= middle).to(tl.int32))
        if count >= TOPK:
            low, above_low = middle, count
            if count == TOPK:
                high = middle
        else:
            high, above_high = middle - 1, count
        is_stuck = above_low - above_high == num_inside
        way = tl.where((above_low - above_high) * 2 > num_inside, (way + 1) % 3, 0)
    return low, TOPK - tl.sum((keys > low).to(tl.int32))


@triton.jit
def _load(first, places, num_scores, READ: tl.constexpr):  # noqa: N803
    return tl.load(first + places, mask=places < (num_scores + READ - 1) // READ * READ, other=0.0)


@triton.jit
def _order(values):
    """int32 keys that are ordered as the float32 numbers are."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # + 0.0 turns -0.0 into 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
