"""The sum of what the ranks sent back, part by part, widened to float32, and what else is to be added, in one pass.

Plain torch reduces the outer dimension and widens at half the memory's speed; here every number is read once and
written once. Invariant: parts are added in float32 in rank order, then the addend.

Shape letters: G parts, C rows of a part, T rows that count, D hidden.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

BLOCK_SIZE = 1024
NUM_WARPS = 4


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
