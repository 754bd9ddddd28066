"""The sum of parts, widened to float32, and what else is to be added, in one pass: of a product's, or of what the ranks
sent back.

Plain torch reduces the outer dimension and widens at half the memory's speed; here every number is read once and
written once. Of what came from ranks, only the parts of those that a token went to are read: six of sixteen, where
eight experts are drawn. Invariant: parts are added in float32 in their order, then the addend.

Shape letters: G parts, C rows of a part, T rows that count, D hidden, K experts per token, E experts.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

BLOCK_SIZE = 1024
NUM_WARPS = 4
VISITED_BLOCK = 512  # 64 and 128 tokens of 16 ranks on an H200: 4.1 and 6.1 us, 5.7 and 7.1 with the block above


def sum_parts(
    parts: torch.Tensor, num_rows: int, factor: float = 1.0, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """``parts: [G, C, D]``, any float dtype -> [num_rows, D] float32: the first rows of all parts, added, times
    ``factor``. With ``addend: [num_rows, D]`` of any float, contiguous, added last: in its dtype."""
    num_parts, _, hidden_size = parts.shape
    assert parts.stride(2) == 1, f"strides {parts.stride()}"
    assert addend is None or addend.is_contiguous(), "rows of the addend are found as the result's are"
    out = parts.new_empty(num_rows, hidden_size, dtype=torch.float32 if addend is None else addend.dtype)
    if num_rows == 0:
        return out
    num_blocks = triton.cdiv(hidden_size, BLOCK_SIZE)
    _sum_parts_kernel[(num_rows * num_blocks,)](
        parts,
        parts if addend is None else addend,
        out,
        hidden_size,
        parts.stride(0),
        parts.stride(1),
        float(factor),
        NUM_PARTS=num_parts,
        HAS_ADDEND=addend is not None,
        NUM_BLOCKS=num_blocks,
        BLOCK=BLOCK_SIZE,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )
    return out


def sum_visited_parts(
    parts: torch.Tensor, topk_ids: torch.Tensor, expert_owner: torch.Tensor, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """``parts: [G, C, D]``, any float dtype, ``topk_ids: [T, K]`` int32, ``expert_owner: [E + 1]`` int32: id -> part,
    the last for -1 -> [T, D] float32: of each token the parts that own its experts, added in order. With ``addend:
    [T, D]`` as ``sum_parts``. Other parts may hold anything.
    """
    num_parts, _, hidden_size = parts.shape
    num_tokens, num_ids = topk_ids.shape
    assert parts.stride(2) == 1, f"strides {parts.stride()}"
    assert addend is None or addend.is_contiguous(), "rows of the addend are found as the result's are"
    dtype = torch.float32 if addend is None else addend.dtype
    out = parts.new_empty(num_tokens, hidden_size, dtype=dtype)
    if num_tokens == 0:
        return out
    num_blocks = triton.cdiv(hidden_size, VISITED_BLOCK)
    _sum_visited_parts_kernel[(num_tokens * num_blocks,)](
        parts,
        topk_ids,
        expert_owner,
        parts if addend is None else addend,
        out,
        hidden_size,
        expert_owner.shape[0] - 1,
        parts.stride(0),
        parts.stride(1),
        topk_ids.stride(0),
        topk_ids.stride(1),
        NUM_PARTS=num_parts,
        NUM_IDS=num_ids,
        PADDED_IDS=triton.next_power_of_2(num_ids),
        HAS_ADDEND=addend is not None,
        NUM_BLOCKS=num_blocks,
        BLOCK=VISITED_BLOCK,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )
    return out


@triton.jit
def _sum_parts_kernel(
    parts,
    addend,
    out,
    hidden_size,
    part_stride,
    row_stride,
    factor,
    NUM_PARTS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    HAS_ADDEND: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    # Neighbours work on one row, so that what is in flight lies together in memory.
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < hidden_size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = row * row_stride  # int64, and so is what is added to it: all parts together may pass 2^31 numbers
    for _ in tl.static_range(NUM_PARTS):
        total += tl.load(parts + start + columns, mask=is_column, other=0.0).to(tl.float32)
        start += part_stride
    total *= factor
    if HAS_ADDEND:
        total += tl.load(addend + row * hidden_size + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row * hidden_size + columns, total.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _sum_visited_parts_kernel(
    parts,
    topk_ids,
    expert_owner,
    addend,
    out,
    hidden_size,
    num_experts,
    part_stride,
    row_stride,
    id_stride,
    id_column_stride,
    NUM_PARTS: tl.constexpr,  # noqa: N803
    NUM_IDS: tl.constexpr,  # noqa: N803
    PADDED_IDS: tl.constexpr,  # noqa: N803
    HAS_ADDEND: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < hidden_size
    slots = tl.arange(0, PADDED_IDS)
    ids = tl.load(topk_ids + row * id_stride + slots * id_column_stride, mask=slots < NUM_IDS, other=-1)
    owners = tl.load(expert_owner + tl.where(ids < 0, num_experts, ids))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_ADDEND:
        added = tl.load(addend + row * hidden_size + columns, mask=is_column, other=0.0).to(tl.float32)
    part = -1
    for _ in tl.static_range(min(NUM_PARTS, NUM_IDS)):
        part = tl.min(tl.where(owners > part, owners, NUM_PARTS))
        source = parts + row * row_stride + part.to(tl.int64) * part_stride
        total += tl.load(source + columns, mask=is_column & (part < NUM_PARTS), other=0.0).to(tl.float32)
    if HAS_ADDEND:
        total += added
    tl.store(out + row * hidden_size + columns, total.to(out.dtype.element_ty), mask=is_column)
