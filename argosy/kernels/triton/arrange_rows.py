"""Received rows -> the experts' rows: a stable counting sort and the copy, in three kernels, and in fewer for few rows.

Plain torch sorts, searches, inverts and gathers in a dozen; and a gather of fixed length also copies rows of experts
that are elsewhere, which here nobody touches. Chunks of entries are counted, one sum over them tells where each chunk's
rows of an expert begin, and rows are copied there. Invariant: an expert's rows stand in the order of their entries, so
the arrangement does not depend on the launch.

Shape letters: N received rows, K experts per token, D hidden, E experts, e local experts, M sorted rows, C chunks.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.arrange_chunks import CHUNK, arrange_chunks, choose_table, count_chunks
from argosy.kernels.triton.arrange_few_rows import MAX_ENTRIES, arrange_few_rows
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Numbers of a row that a program copies, and its warps: where all rows have experts, and where most have none, and
# finding that out costs more than copying the others: 4 us in the step of one of 16 ranks with 64 tokens (H200), where
# blocks of 2,048, and ids read one by one, took 9.4 for rows twice as wide. No other sizes were tried.
WHOLE_BLOCK, WHOLE_WARPS = 2048, 4
SHARE_BLOCK, SHARE_WARPS = 8192, 4
# Of one expert's sums: numbers of all experts, and chunks of its own, that a program reads at once, and its warps.
SUM_BLOCK, SUM_CHUNKS, SUM_WARPS = 8192, 1024, 8


def arrange_sorted(
    x: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor, num_local_experts: int, num_rows: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x: [N, D]``, ``topk_ids: [N, K]`` int32, ``expert_map: [E + 1]`` int32, e for what is elsewhere.

    -> rows [num_rows, D] (N * K for None; those behind the last expert's are not written), counts [e] int32,
    row_ids [N, K] int64, -1 for what is elsewhere.
    """
    rows = x.new_empty(topk_ids.numel() if num_rows is None else num_rows, x.shape[1])
    counts, row_ids = _arrange(x, topk_ids, expert_map, rows, num_local_experts)
    return rows, counts, row_ids


def arrange_scaled(
    x: torch.Tensor,
    scale: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    num_local_experts: int,
    num_rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``arrange_sorted``, for rows in 8 bits: ``x: [N, D]``, ``scale: [N, G]`` f32 of any strides.

    -> rows [num_rows, D], their scales [num_rows, G], whose columns are contiguous, counts, row_ids.
    """
    num_rows = topk_ids.numel() if num_rows is None else num_rows
    rows = x.new_empty(num_rows, x.shape[1])
    row_scale = scale.new_empty(scale.shape[1], num_rows).t()
    counts, row_ids = _arrange(x, topk_ids, expert_map, rows, num_local_experts, (scale, row_scale))
    return rows, row_scale, counts, row_ids


def arrange_padded(
    x: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``arrange_sorted`` -> rows [e, N, D], padding 0, counts [e] int32, row_ids [N, K] int64 over e * N."""
    capacity = x.shape[0]
    places, table = count_chunks(topk_ids, expert_map, num_local_experts)
    counts, starts = _sum_chunks(table, num_local_experts, capacity)
    rows = x.new_zeros(num_local_experts, capacity, x.shape[1])
    is_share = num_local_experts < expert_map.shape[0] - 1
    return rows, counts, _copy_rows(x, places, starts, rows, is_share=is_share)


def _arrange(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    rows: torch.Tensor,
    num_local_experts: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes ``rows``, and of ``scales`` the second from the first -> counts, row_ids. Few entries take one launch, and
    a decode step's of a share of the experts no program that reads all ids."""
    num_entries = topk_ids.numel()
    if 0 < num_entries <= MAX_ENTRIES:
        x, rows = _as_numbers(x), _as_numbers(rows)
        return arrange_few_rows(x, topk_ids, expert_map, rows, num_local_experts, scales)
    table_size = choose_table(num_entries, num_local_experts, expert_map.shape[0] - 1)
    if table_size is not None and num_entries > 0:
        x, rows = _as_numbers(x), _as_numbers(rows)
        return arrange_chunks(x, topk_ids, expert_map, rows, num_local_experts, table_size, scales)
    places, table = count_chunks(topk_ids, expert_map, num_local_experts)
    counts, starts = _sum_chunks(table, num_local_experts)
    is_share = num_local_experts < expert_map.shape[0] - 1
    return counts, _copy_rows(x, places, starts, rows, scales, is_share=is_share)


def _sum_chunks(
    table: torch.Tensor, num_local_experts: int, capacity: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``table: [C, e rounded up]`` uint8 -> entries of each local expert [e], the row of a chunk's first entry of each
    expert [C, e rounded up] int32; with a capacity, an expert has that many rows."""
    num_chunks, num_columns = table.shape
    counts = table.new_empty(num_local_experts, dtype=torch.int32)
    starts = table.new_empty(table.shape, dtype=torch.int32)
    _sum_chunks_kernel[(num_local_experts,)](
        table,
        counts,
        starts,
        num_chunks,
        capacity or 0,
        EXPERTS=num_columns,
        IS_PADDED=capacity is not None,
        BLOCK=max(SUM_BLOCK, num_columns),
        CHUNKS=SUM_CHUNKS,
        num_warps=SUM_WARPS,
        launch_pdl=IS_ON,
    )
    return counts, starts


def _copy_rows(
    x: torch.Tensor,
    places: torch.Tensor,
    starts: torch.Tensor,
    rows: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    is_share: bool,
) -> torch.Tensor:
    """Writes ``rows``, and of ``scales`` the second from the first -> row_ids [N, K] int64."""
    row_ids = places.new_empty(places.shape, dtype=torch.int64)
    if places.shape[0] == 0:
        return row_ids
    block = min(SHARE_BLOCK, triton.next_power_of_2(x.shape[1])) if is_share else WHOLE_BLOCK
    num_blocks = triton.cdiv(x.shape[1], block)
    num_scales = scales[0].shape[1] if scales else 0
    scale, row_scale = scales or (x, rows)  # a launch needs pointers
    _copy_rows_kernel[(x.shape[0] * num_blocks,)](
        _as_numbers(x),
        places,
        starts,
        _as_numbers(rows),
        row_ids,
        _as_numbers(scale),
        _as_numbers(row_scale),
        x.shape[1],
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
        EXPERTS=starts.shape[1],
        IS_SHARE=is_share,
        num_warps=SHARE_WARPS if is_share else WHOLE_WARPS,
        launch_pdl=IS_ON,
    )
    return row_ids


def _as_numbers(x: torch.Tensor) -> torch.Tensor:
    """8-bit floats as the bytes that they are: they are only copied."""
    return x.view(torch.int8) if x.element_size() == 1 else x


@triton.jit(do_not_specialize=["num_chunks", "capacity"])
def _sum_chunks_kernel(
    table,
    counts,
    starts,
    num_chunks,
    capacity,
    EXPERTS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    IS_PADDED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    CHUNKS: tl.constexpr,  # noqa: N803
):
    """One program a local expert: it adds what all chunks have of lower experts, then its own chunk by chunk."""
    let_next_start()
    wait_for_inputs()
    expert = tl.program_id(0)
    if IS_PADDED:
        start = expert * capacity
    else:
        spots = tl.arange(0, BLOCK)
        num_before = tl.zeros((BLOCK,), dtype=tl.int32)
        for first in range(0, num_chunks, BLOCK // EXPERTS):
            is_chunk = first + spots // EXPERTS < num_chunks
            numbers = tl.load(table + first * EXPERTS + spots, mask=is_chunk, other=0)
            num_before += tl.where(spots % EXPERTS < expert, numbers.to(tl.int32), 0)
        start = tl.sum(num_before, axis=0)
    num_mine = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)
        is_chunk = chunks < num_chunks
        numbers = tl.load(table + chunks * EXPERTS + expert, mask=is_chunk, other=0).to(tl.int32)
        before = start + num_mine + tl.cumsum(numbers, axis=0) - numbers
        tl.store(starts + chunks * EXPERTS + expert, before, mask=is_chunk)
        num_mine += tl.sum(numbers, axis=0)
    tl.store(counts + expert, num_mine)


@triton.jit(do_not_specialize=["scale_column_stride", "row_scale_column_stride"])
def _copy_rows_kernel(
    x,
    places,
    starts,
    rows,
    row_ids,
    scale,
    row_scale,
    hidden_size,
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
    IS_SHARE: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    source = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    block = tl.program_id(0) % NUM_BLOCKS
    columns = block * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < hidden_size
    slots = tl.arange(0, BLOCK_IDS)
    is_slot = slots < NUM_IDS
    entries = source * NUM_IDS + slots
    place = tl.load(places + entries, mask=is_slot, other=-1)
    is_local = place >= 0
    is_read = is_column
    if IS_SHARE:  # most rows have no expert here: finding that out takes a wait that whole ranks do without
        is_read &= tl.max(place) >= 0
    values = tl.load(x + source * x_stride + columns, mask=is_read, other=0)
    scale_columns = tl.arange(0, BLOCK_SCALES)
    is_scale = (scale_columns < NUM_SCALES) & (block == 0)
    if NUM_SCALES > 0:
        steps = tl.load(scale + source * scale_stride + scale_columns * scale_column_stride, mask=is_scale, other=0.0)
    start = tl.load(starts + entries // CHUNK_ENTRIES * EXPERTS + place // 256, mask=is_local, other=0)
    row_of_slot = tl.where(is_local, start + place % 256, -1)
    tl.store(row_ids + entries, row_of_slot.to(tl.int64), mask=is_slot & (block == 0))
    if tl.max(row_of_slot) >= 0:
        for slot in tl.static_range(NUM_IDS):
            row = tl.max(tl.where(slots == slot, row_of_slot, -1)).to(tl.int64)
            if row >= 0:
                tl.store(rows + row * hidden_size + columns, values, mask=is_column)
                if NUM_SCALES > 0:
                    scale_places = row_scale + row * row_scale_stride + scale_columns * row_scale_column_stride
                    tl.store(scale_places, steps, mask=is_scale)
