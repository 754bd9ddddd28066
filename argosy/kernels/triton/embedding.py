"""Rows of a table by their numbers: what a decode step begins with.

Torch's lookup gives a few long rows to a few programs. Invariant: bit for bit what ``F.embedding`` gives.

Shape letters: T tokens, V rows of the table, D numbers of a row.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Not measured yet.
BLOCK_SIZE, NUM_WARPS = 1024, 4


def look_up(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``table: [V, D]``, rows contiguous, ``ids: [T]`` int64, each a row of it -> [T, D]."""
    num_tokens, size = ids.shape[0], table.shape[1]
    rows = table.new_empty(num_tokens, size)
    if num_tokens:
        num_blocks = triton.cdiv(size, BLOCK_SIZE)
        _look_up_kernel[(num_tokens * num_blocks,)](
            table,
            ids,
            rows,
            size,
            ids.stride(0),
            table.stride(0),
            NUM_BLOCKS=num_blocks,
            BLOCK=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            launch_pdl=IS_ON,
        )
    return rows


@triton.jit
def _look_up_kernel(
    table,
    ids,
    rows,
    size,
    id_stride,
    table_stride,
    NUM_BLOCKS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < size
    row = tl.load(ids + token * id_stride)
    values = tl.load(table + row * table_stride + columns, mask=is_column)
    tl.store(rows + token * size + columns, values, mask=is_column)
