"""A decode batch into the tensors that recordings read, in one launch instead of seven small copies.

Invariant: what ``reference_paged.fill_decode_inputs`` gives, in every row and column that it writes.

Shape letters: B rows of the batch, n rows of the recording.
"""

import triton
import triton.language as tl

from argosy.kernels.reference_paged import DecodeInputs

MAX_BLOCK = 1024  # entries of a block table that a program copies at once
NUM_WARPS = 4


def fill_decode_inputs(target: DecodeInputs, source: DecodeInputs) -> None:
    """See ``reference_paged.fill_decode_inputs``; vectors are contiguous, rows of block tables may be strided."""
    block_table, source_table = target[4], source[4]
    num_rows, num_blocks = source_table.shape
    _fill_decode_inputs_kernel[(target[0].shape[0],)](
        *target,
        *source,
        num_rows,
        num_blocks,
        block_table.stride(0),
        source_table.stride(0),
        BLOCK=min(MAX_BLOCK, triton.next_power_of_2(block_table.shape[1])),
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "source_table_stride"])
def _fill_decode_inputs_kernel(
    input_ids,
    positions,
    slot_mapping,
    seq_lens,
    block_table,
    source_ids,
    source_positions,
    source_slots,
    source_lens,
    source_table,
    num_rows,
    num_blocks,
    table_stride,
    source_table_stride,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
):
    row = tl.program_id(0).to(tl.int64)
    if row >= num_rows:
        tl.store(slot_mapping + row, -1)
        tl.store(seq_lens + row, 1)
        return
    tl.store(input_ids + row, tl.load(source_ids + row))
    tl.store(positions + row, tl.load(source_positions + row))
    tl.store(slot_mapping + row, tl.load(source_slots + row))
    tl.store(seq_lens + row, tl.load(source_lens + row))
    for first in tl.range(0, num_blocks, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        blocks = tl.load(source_table + row * source_table_stride + columns, mask=columns < num_blocks, other=0)
        tl.store(block_table + row * table_stride + columns, blocks, mask=columns < num_blocks)
