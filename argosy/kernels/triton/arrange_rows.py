"""Received rows -> the experts' rows: a stable counting sort and the copy, in two kernels, and in one for a few rows.

Plain torch sorts, searches, inverts and gathers in a dozen; and a gather of fixed length also copies rows of experts
that are elsewhere, which here nobody touches. Invariant: an expert's rows stand in the order of their entries, so the
arrangement does not depend on the launch.

Shape letters: N received rows, K experts per token, D hidden, E experts, e local experts, M sorted rows.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.arrange_few_rows import MAX_ENTRIES, arrange_few_rows
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Numbers of a row that a program copies, and its warps: where all rows have experts, and where most have none, and
# finding that out costs more than copying the others: 4 us in the step of one of 16 ranks with 64 tokens (H200), where
# blocks of 2,048, and ids read one by one, took 9.4 for rows twice as wide. No other sizes were tried.
WHOLE_BLOCK, WHOLE_WARPS = 2048, 4
SHARE_BLOCK, SHARE_WARPS = 8192, 4
# Entries that one program of the count reads at once, and its warps: for a decode step, and for more.
FEW_ENTRIES, FEW_WARPS = 1024, 4
MANY_ENTRIES, MANY_WARPS = 8192, 32


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
    counts, _, places = _count_entries(topk_ids, expert_map, num_local_experts)
    capacity = x.shape[0]
    starts = torch.arange(0, num_local_experts, dtype=torch.int32, device=x.device) * capacity
    rows = x.new_zeros(num_local_experts, capacity, x.shape[1])
    return rows, counts, _copy_rows(x, topk_ids, expert_map, starts, places, rows, num_local_experts)


def _arrange(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    rows: torch.Tensor,
    num_local_experts: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes ``rows``, and of ``scales`` the second from the first -> counts, row_ids: few entries in one launch."""
    if 0 < topk_ids.numel() <= MAX_ENTRIES:
        x, rows = _as_numbers(x), _as_numbers(rows)
        return arrange_few_rows(x, topk_ids, expert_map, rows, num_local_experts, scales)
    counts, starts, places = _count_entries(topk_ids, expert_map, num_local_experts)
    return counts, _copy_rows(x, topk_ids, expert_map, starts, places, rows, num_local_experts, scales)


def _count_entries(
    topk_ids: torch.Tensor, expert_map: torch.Tensor, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> entries of each local expert [e], entries of those before it [e], an entry's place in its expert [N, K].

    Places of entries that are elsewhere are not written.
    """
    num_entries = topk_ids.numel()
    counts, starts = topk_ids.new_empty(2, num_local_experts).unbind(0)
    places = topk_ids.new_empty(topk_ids.shape)
    is_few = num_entries <= FEW_ENTRIES
    _count_entries_kernel[(num_local_experts,)](
        topk_ids,
        expert_map,
        counts,
        starts,
        places,
        num_entries,
        expert_map.shape[0] - 1,
        topk_ids.stride(0),
        topk_ids.stride(1),
        NUM_IDS=topk_ids.shape[1],
        BLOCK=FEW_ENTRIES if is_few else MANY_ENTRIES,
        num_warps=FEW_WARPS if is_few else MANY_WARPS,
        launch_pdl=IS_ON,
    )
    return counts, starts, places


def _copy_rows(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    starts: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    num_local_experts: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Writes ``rows``, and of ``scales`` the second from the first -> row_ids [N, K] int64."""
    row_ids = topk_ids.new_empty(topk_ids.shape, dtype=torch.int64)
    if topk_ids.shape[0] == 0:
        return row_ids
    is_share = num_local_experts < expert_map.shape[0] - 1
    block = min(SHARE_BLOCK, triton.next_power_of_2(x.shape[1])) if is_share else WHOLE_BLOCK
    num_blocks = triton.cdiv(x.shape[1], block)
    num_scales = scales[0].shape[1] if scales else 0
    scale, row_scale = scales or (x, rows)  # a launch needs pointers
    _copy_rows_kernel[(x.shape[0] * num_blocks,)](
        _as_numbers(x),
        topk_ids,
        expert_map,
        starts,
        places,
        _as_numbers(rows),
        row_ids,
        _as_numbers(scale),
        _as_numbers(row_scale),
        x.shape[1],
        expert_map.shape[0] - 1,
        num_local_experts,
        x.stride(0),
        topk_ids.stride(0),
        topk_ids.stride(1),
        scale.stride(0),
        scale.stride(1),
        row_scale.stride(0),
        row_scale.stride(1),
        NUM_IDS=topk_ids.shape[1],
        BLOCK_IDS=triton.next_power_of_2(topk_ids.shape[1]),
        NUM_SCALES=num_scales,
        BLOCK_SCALES=triton.next_power_of_2(max(1, num_scales)),
        NUM_BLOCKS=num_blocks,
        BLOCK=block,
        IS_SHARE=is_share,
        num_warps=SHARE_WARPS if is_share else WHOLE_WARPS,
        launch_pdl=IS_ON,
    )
    return row_ids


def _as_numbers(x: torch.Tensor) -> torch.Tensor:
    """8-bit floats as the bytes that they are: they are only copied."""
    return x.view(torch.int8) if x.element_size() == 1 else x


@triton.jit(do_not_specialize=["num_entries"])
def _count_entries_kernel(
    topk_ids,
    expert_map,
    counts,
    starts,
    places,
    num_entries,
    num_experts,
    id_stride,
    id_column_stride,
    NUM_IDS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    """One program a local expert, which reads all entries: so it also knows how many stand before its own."""
    expert = tl.program_id(0)
    num_mine = tl.zeros((), dtype=tl.int32)
    num_before = tl.zeros((), dtype=tl.int32)
    for start in range(0, num_entries, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        is_entry = entries < num_entries
        rows = (entries // NUM_IDS).to(tl.int64)
        ids = tl.load(topk_ids + rows * id_stride + (entries % NUM_IDS) * id_column_stride, mask=is_entry, other=-1)
        local = tl.load(expert_map + tl.where(ids < 0, num_experts, ids))
        is_mine = ((local == expert) & is_entry).to(tl.int32)
        place = num_mine + tl.cumsum(is_mine, axis=0) - 1
        tl.store(places + entries, place, mask=is_mine > 0)
        num_mine += tl.sum(is_mine, axis=0)
        num_before += tl.sum(((local < expert) & is_entry).to(tl.int32), axis=0)
    tl.store(counts + expert, num_mine)
    tl.store(starts + expert, num_before)


@triton.jit(do_not_specialize=["scale_column_stride", "row_scale_column_stride"])
def _copy_rows_kernel(
    x,
    topk_ids,
    expert_map,
    starts,
    places,
    rows,
    row_ids,
    scale,
    row_scale,
    hidden_size,
    num_experts,
    num_local_experts,
    x_stride,
    id_stride,
    id_column_stride,
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
    ids = tl.load(topk_ids + source * id_stride + slots * id_column_stride, mask=is_slot, other=-1)
    local_ids = tl.load(expert_map + tl.where(ids < 0, num_experts, ids))
    is_local = is_slot & (local_ids < num_local_experts)
    is_read = is_column
    if IS_SHARE:  # most rows have no expert here: finding that out takes a wait that whole ranks do without
        is_read &= tl.max(is_local.to(tl.int32)) > 0
    values = tl.load(x + source * x_stride + columns, mask=is_read, other=0)
    scale_columns = tl.arange(0, BLOCK_SCALES)
    is_scale = (scale_columns < NUM_SCALES) & (block == 0)
    if NUM_SCALES > 0:
        steps = tl.load(scale + source * scale_stride + scale_columns * scale_column_stride, mask=is_scale, other=0.0)
    place = tl.load(places + source * NUM_IDS + slots, mask=is_local, other=0)
    start = tl.load(starts + local_ids, mask=is_local, other=0)
    row_of_slot = tl.where(is_local, start + place, -1)
    tl.store(row_ids + source * NUM_IDS + slots, row_of_slot.to(tl.int64), mask=is_slot & (block == 0))
    if tl.max(row_of_slot) >= 0:
        for slot in tl.static_range(NUM_IDS):
            row = tl.max(tl.where(slots == slot, row_of_slot, -1)).to(tl.int64)
            if row >= 0:
                tl.store(rows + row * hidden_size + columns, values, mask=is_column)
                if NUM_SCALES > 0:
                    scale_places = row_scale + row * row_scale_stride + scale_columns * row_scale_column_stride
                    tl.store(scale_places, steps, mask=is_scale)
