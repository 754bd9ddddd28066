"""Received rows -> the experts' rows in one launch, for a decode step: every program reads all ids.

So few ids are there that finding a row's place costs less than a launch that counts before: it is the number of entries
of lower experts, and of its own experts' before it. Invariant: what ``arrange_rows.py`` makes in three launches.

Shape letters: N received rows, K experts per token, D hidden, E experts, e local experts, G scales of a row.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Entries that a program holds, which are all, numbers of a row that it copies, and its warps: a thread copies 16 of 8
# bits. With more entries it would hold too many numbers. Not measured yet.
FEW_ENTRIES, FEW_BLOCK, FEW_WARPS = 128, 2048, 4
MAX_ENTRIES, MAX_BLOCK, MAX_WARPS = 1024, 4096, 8
COUNTED_EXPERTS = 8  # of one program
NOBODY: tl.constexpr = tl.constexpr(2**30)  # above every local expert's number


def arrange_few_rows(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor,
    rows: torch.Tensor,
    num_local_experts: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes ``rows``, and of ``scales`` the second from the first -> counts [e] int32, row_ids [N, K] int64.

    N * K is at most ``MAX_ENTRIES`` and not 0. 8-bit numbers come as int8.
    """
    num_entries, num_ids = topk_ids.numel(), topk_ids.shape[1]
    assert 0 < num_entries <= MAX_ENTRIES, num_entries
    counts = topk_ids.new_empty(num_local_experts)
    row_ids = topk_ids.new_empty(topk_ids.shape, dtype=torch.int64)
    is_few = num_entries <= FEW_ENTRIES
    block = FEW_BLOCK if is_few else MAX_BLOCK
    num_blocks = triton.cdiv(x.shape[1], block)
    num_scales = scales[0].shape[1] if scales else 0
    scale, row_scale = scales or (x, rows)  # a launch needs pointers
    num_copies = x.shape[0] * num_blocks
    _arrange_few_kernel[(num_copies + triton.cdiv(num_local_experts, COUNTED_EXPERTS),)](
        x,
        topk_ids,
        expert_map,
        rows,
        counts,
        row_ids,
        scale,
        row_scale,
        num_entries,
        num_copies,
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
        NUM_IDS=num_ids,
        PADDED_IDS=triton.next_power_of_2(num_ids),
        NUM_SCALES=num_scales,
        BLOCK_SCALES=triton.next_power_of_2(max(1, num_scales)),
        NUM_BLOCKS=num_blocks,
        BLOCK=block,
        ENTRIES=FEW_ENTRIES if is_few else MAX_ENTRIES,
        EXPERTS=COUNTED_EXPERTS,
        num_warps=FEW_WARPS if is_few else MAX_WARPS,
        launch_pdl=IS_ON,
    )
    return counts, row_ids


@triton.jit(do_not_specialize=["num_entries", "num_copies"])
def _arrange_few_kernel(
    x,
    topk_ids,
    expert_map,
    rows,
    counts,
    row_ids,
    scale,
    row_scale,
    num_entries,
    num_copies,
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
    NUM_IDS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    PADDED_IDS: tl.constexpr,  # noqa: N803
    NUM_SCALES: tl.constexpr,  # noqa: N803
    BLOCK_SCALES: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    ENTRIES: tl.constexpr,  # noqa: N803
    EXPERTS: tl.constexpr,  # noqa: N803
):
    """The first programs copy a piece of a row to all its places, the others count."""
    let_next_start()
    wait_for_inputs()
    entries = tl.arange(0, ENTRIES)
    is_entry = entries < num_entries
    ids = topk_ids + (entries // NUM_IDS) * id_stride + (entries % NUM_IDS) * id_column_stride
    experts = _map_ids(tl.load(ids, mask=is_entry, other=-1), expert_map, num_experts)
    experts = tl.where(is_entry, experts, NOBODY)[None, :]
    if tl.program_id(0) >= num_copies:
        counted = (tl.program_id(0) - num_copies) * EXPERTS + tl.arange(0, EXPERTS)
        number = tl.sum((experts == counted[:, None]).to(tl.int32), axis=1)
        tl.store(counts + counted, number, mask=counted < num_local_experts)
    else:
        source = tl.program_id(0) // NUM_BLOCKS
        block = tl.program_id(0) % NUM_BLOCKS
        columns = block * BLOCK + tl.arange(0, BLOCK)
        is_column = columns < hidden_size
        values = tl.load(x + source.to(tl.int64) * x_stride + columns, mask=is_column, other=0)
        slots = tl.arange(0, PADDED_IDS)
        is_slot = slots < NUM_IDS
        mine = tl.load(topk_ids + source * id_stride + slots * id_column_stride, mask=is_slot, other=-1)
        mine = _map_ids(mine, expert_map, num_experts)
        is_local = is_slot & (mine < num_local_experts)
        is_earlier = entries[None, :] < (source * NUM_IDS + slots)[:, None]
        is_before = (experts < mine[:, None]) | ((experts == mine[:, None]) & is_earlier)
        row = tl.where(is_local, tl.sum(is_before.to(tl.int32), axis=1), -1).to(tl.int64)
        places = rows + row[:, None] * hidden_size + columns[None, :]
        values = tl.broadcast_to(values[None, :], (PADDED_IDS, BLOCK))
        tl.store(places, values, mask=is_local[:, None] & is_column[None, :])
        if NUM_SCALES > 0:
            scale_columns = tl.arange(0, BLOCK_SCALES)
            is_scale = (scale_columns < NUM_SCALES) & (block == 0)
            steps = scale + source.to(tl.int64) * scale_stride + scale_columns * scale_column_stride
            steps = tl.load(steps, mask=is_scale, other=0.0)
            places = row_scale + row[:, None] * row_scale_stride + scale_columns[None, :] * row_scale_column_stride
            steps = tl.broadcast_to(steps[None, :], (PADDED_IDS, BLOCK_SCALES))
            tl.store(places, steps, mask=is_local[:, None] & is_scale[None, :])
        tl.store(row_ids + source.to(tl.int64) * NUM_IDS + slots, row, mask=is_slot & (block == 0))


@triton.jit
def _map_ids(ids, expert_map, num_experts):
    """-1 is nobody's: the map's last entry."""
    return tl.load(expert_map + tl.where(ids < 0, num_experts, ids))
