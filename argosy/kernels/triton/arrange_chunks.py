"""Received rows -> the rows of a share of the experts, for a decode step: chunks of entries are counted, then copied.

No program reads all ids. One of the count reads a chunk of entries, and writes how many of them each local expert has,
and an entry's place among them; a program of the copy adds up the chunks that lie before its own. So a copy waits for
places alone, and not for ids, what they map to, and what that expert has before. Invariant: what ``arrange_rows.py``
makes of the same arguments.

Shape letters: N received rows, K experts per token, D hidden, E experts, e local experts, C chunks, G scales of a row.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, fetch_lines, let_next_start, wait_for_inputs

# Entries of a chunk, whose number fits into 8 bits, and warps of its program: a thread has one entry, and a word for
# each four experts; with more words than it has registers for, other threads take some of them.
CHUNK, COUNT_WARPS = 128, 4
MAX_WORDS, MANY_WORDS_WARPS = 64, 16
# A chunk's numbers for all local experts are whole words, and a copy reads all chunks' numbers: from the fewest that
# it is compiled for to the most, up to 4,096 rows of 8 entries for one of 16 ranks.
MIN_TABLE, MAX_TABLE = 1024, 4096
MAX_LOCAL_EXPERTS = 256  # an expert's number has 8 bits of a place
# One of 16 ranks, 1,024 and 2,048 received rows, on an H200: count and copy 4.5 and 6.1 us, 9.5 and 14.6 where each
# expert's program read all ids. Copies in 2 or 8 warps, or in blocks of 4,096, take 0.1 to 0.4 us more; with 40
# registers a thread, so that all are there at once, 1.0 and 0.8 more.
COPY_BLOCK, COPY_WARPS = 8192, 4
WORD_BYTES: tl.constexpr = tl.constexpr(4)
IDS_PER_LINE: tl.constexpr = tl.constexpr(32)
NO_PLACE: tl.constexpr = tl.constexpr(2**30)  # behind every slot's


def choose_table(num_entries: int, num_local_experts: int, num_experts: int) -> int | None:
    """Numbers that a program of the copy holds, a power of two; None: not for this kernel.

    All experts' rows would each be copied to K places, and a program look for all of them.
    """
    num_numbers = triton.cdiv(num_entries, CHUNK) * _pad_experts(num_local_experts)
    if num_local_experts >= min(num_experts, MAX_LOCAL_EXPERTS + 1) or num_numbers > MAX_TABLE:
        return None
    return max(MIN_TABLE, int(triton.next_power_of_2(num_numbers)))


def arrange_chunks(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    rows: torch.Tensor,
    num_local_experts: int,
    table_size: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes ``rows``, and of ``scales`` the second from the first -> counts [e] int32, row_ids [N, K] int64.

    ``table_size`` is what ``choose_table`` says, and N * K is not 0. 8-bit numbers come as int8.
    """
    places, table = count_chunks(topk_ids, expert_map, num_local_experts)
    return copy_rows(x, places, table, rows, num_local_experts, table_size, scales)


def count_chunks(
    topk_ids: torch.Tensor, expert_map: torch.Tensor, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> an entry's local expert * 256 and its place in its chunk [N, K] int32, -1 for what is elsewhere; how many
    entries of a chunk each expert has [C, e rounded up] uint8."""
    num_entries, num_experts = topk_ids.numel(), expert_map.shape[0] - 1
    num_words = _pad_experts(num_local_experts) // WORD_BYTES.value
    num_chunks = triton.cdiv(num_entries, CHUNK)
    places = topk_ids.new_empty(topk_ids.shape)
    table = topk_ids.new_empty(num_chunks, num_words)
    if num_chunks == 0:
        return places, table.view(torch.uint8)
    _count_chunks_kernel[(num_chunks,)](
        topk_ids,
        expert_map,
        places,
        table,
        num_entries,
        num_experts,
        num_local_experts,
        topk_ids.stride(0),
        topk_ids.stride(1),
        NUM_IDS=topk_ids.shape[1],
        NUM_LINES=triton.next_power_of_2(triton.cdiv(num_experts + 1, IDS_PER_LINE.value)),
        NUM_WORDS=num_words,
        BLOCK=CHUNK,
        num_warps=COUNT_WARPS if num_words <= MAX_WORDS else MANY_WORDS_WARPS,
        launch_pdl=IS_ON,
    )
    return places, table.view(torch.uint8)


def copy_rows(
    x: torch.Tensor,
    places: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    num_local_experts: int,
    table_size: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With what ``count_chunks`` made -> counts [e] int32, row_ids [N, K] int64; writes as ``arrange_chunks``."""
    counts = places.new_empty(num_local_experts)
    row_ids = places.new_empty(places.shape, dtype=torch.int64)
    block = min(COPY_BLOCK, triton.next_power_of_2(x.shape[1]))
    num_blocks = triton.cdiv(x.shape[1], block)
    num_scales = scales[0].shape[1] if scales else 0
    scale, row_scale = scales or (x, rows)  # a launch needs pointers
    _copy_chunk_rows_kernel[(num_local_experts + x.shape[0] * num_blocks,)](
        x,
        places,
        table,
        rows,
        counts,
        row_ids,
        scale,
        row_scale,
        table.shape[0],
        x.shape[1],
        num_local_experts,
        x.stride(0),
        scale.stride(0),
        scale.stride(1),
        row_scale.stride(0),
        row_scale.stride(1),
        NUM_IDS=places.shape[1],
        BLOCK_IDS=triton.next_power_of_2(places.shape[1]),
        NUM_SCALES=num_scales,
        BLOCK_SCALES=triton.next_power_of_2(max(1, num_scales)),
        NUM_BLOCKS=num_blocks,
        BLOCK=block,
        CHUNK_ENTRIES=CHUNK,
        EXPERTS=table.shape[1],
        TABLE=table_size,
        num_warps=COPY_WARPS,
        launch_pdl=IS_ON,
    )
    return counts, row_ids


def _pad_experts(num_local_experts: int) -> int:
    return max(WORD_BYTES.value, int(triton.next_power_of_2(num_local_experts)))


@triton.jit(do_not_specialize=["num_entries"])
def _count_chunks_kernel(
    topk_ids,
    expert_map,
    places,
    table,
    num_entries,
    num_experts,
    num_local_experts,
    id_stride,
    id_column_stride,
    NUM_IDS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    NUM_LINES: tl.constexpr,  # noqa: N803
    NUM_WORDS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program a chunk. Neighbouring threads read neighbouring ids. Four experts' numbers are the bytes of a word,
    which are added at once: a chunk has too few entries to overflow one."""
    let_next_start()
    fetch_lines(expert_map + tl.minimum(tl.arange(0, NUM_LINES) * IDS_PER_LINE, num_experts))
    wait_for_inputs()
    chunk = tl.program_id(0)
    entries = chunk * BLOCK + tl.arange(0, BLOCK)
    is_entry = entries < num_entries
    sources = (entries // NUM_IDS).to(tl.int64)
    ids = tl.load(topk_ids + sources * id_stride + (entries % NUM_IDS) * id_column_stride, mask=is_entry, other=-1)
    experts = tl.load(expert_map + tl.where(ids < 0, num_experts, ids))
    is_local = experts < num_local_experts
    shifts = (experts % WORD_BYTES) * 8
    columns, words = tl.arange(0, BLOCK)[None, :], tl.arange(0, NUM_WORDS)[:, None]
    is_in_word = tl.where(is_local, experts // WORD_BYTES, -1)[None, :] == words
    sums = tl.cumsum(tl.where(is_in_word, (1 << shifts)[None, :], 0), axis=1)
    tl.store(table + chunk * NUM_WORDS + words + 0 * columns, sums, mask=(columns == BLOCK - 1) & (words >= 0))
    place = ((tl.sum(tl.where(is_in_word, sums, 0), axis=0) >> shifts) & 255) - 1
    tl.store(places + entries, tl.where(is_local, experts * 256 + place, -1), mask=is_entry)


@triton.jit(do_not_specialize=["num_chunks", "scale_column_stride", "row_scale_column_stride"])
def _copy_chunk_rows_kernel(
    x,
    places,
    table,
    rows,
    counts,
    row_ids,
    scale,
    row_scale,
    num_chunks,
    hidden_size,
    num_local_experts,
    x_stride,
    scale_stride,
    scale_column_stride,
    row_scale_stride,
    row_scale_column_stride,
    NUM_IDS: tl.constexpr,  # noqa: N803
    BLOCK_IDS: tl.constexpr,  # noqa: N803
    NUM_SCALES: tl.constexpr,  # noqa: N803
    BLOCK_SCALES: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    CHUNK_ENTRIES: tl.constexpr,  # noqa: N803
    EXPERTS: tl.constexpr,  # noqa: N803
    TABLE: tl.constexpr,  # noqa: N803
):
    """The first programs add up an expert's chunks, the others copy a piece of a row to its places, which are few."""
    let_next_start()
    wait_for_inputs()
    spots = tl.arange(0, TABLE)
    chunks, experts = spots // EXPERTS, spots % EXPERTS
    order = experts * TABLE + chunks
    if tl.program_id(0) < num_local_experts:
        expert = tl.program_id(0)
        numbers = tl.load(table + spots, mask=chunks < num_chunks, other=0).to(tl.int32)
        tl.store(counts + expert, tl.sum(tl.where(experts == expert, numbers, 0)))
    else:
        copy = tl.program_id(0) - num_local_experts
        source = (copy // NUM_BLOCKS).to(tl.int64)
        block = copy % NUM_BLOCKS
        slots = tl.arange(0, BLOCK_IDS)
        is_slot = slots < NUM_IDS
        place = tl.load(places + source * NUM_IDS + slots, mask=is_slot, other=-1)
        is_elsewhere = is_slot & (place < 0) & (block == 0)
        tl.store(row_ids + source * NUM_IDS + slots, tl.full((BLOCK_IDS,), -1, tl.int64), mask=is_elsewhere)
        slot_places = tl.where(place < 0, NO_PLACE, slots * 65536 + place)
        slot_place = tl.min(slot_places)
        columns = block * BLOCK + tl.arange(0, BLOCK)
        is_column = columns < hidden_size
        is_read = slot_place < NO_PLACE
        values = tl.load(x + source * x_stride + columns, mask=is_column & is_read, other=0)
        scale_columns = tl.arange(0, BLOCK_SCALES)
        is_scale = (scale_columns < NUM_SCALES) & (block == 0)
        if NUM_SCALES > 0:
            steps = scale + source * scale_stride + scale_columns * scale_column_stride
            steps = tl.load(steps, mask=is_scale & is_read, other=0.0)
        while slot_place < NO_PLACE:
            entry = source * NUM_IDS + slot_place // 65536
            expert = (slot_place // 256) % 256
            numbers = tl.load(table + spots, mask=chunks < num_chunks, other=0).to(tl.int32)
            is_before = order < expert * TABLE + (entry // CHUNK_ENTRIES).to(tl.int32)
            row = (tl.sum(tl.where(is_before, numbers, 0)) + slot_place % 256).to(tl.int64)
            tl.store(rows + row * hidden_size + columns, values, mask=is_column)
            if NUM_SCALES > 0:
                scale_places = row_scale + row * row_scale_stride + scale_columns * row_scale_column_stride
                tl.store(scale_places, steps, mask=is_scale)
            tl.store(row_ids + entry, row, mask=block == 0)
            slot_place = tl.min(tl.where(slot_places > slot_place, slot_places, NO_PLACE))
