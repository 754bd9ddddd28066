"""The place of each row's largest number, in two launches: blocks of a row side by side, then the best of its blocks.

A vocabulary is long and a decode batch is low: torch gives a row to one program or a few. Numbers are compared as
integers that order as floats do. Invariant: what ``torch.argmax`` gives on a CPU: the lowest place among equal numbers,
0.0 and -0.0 among them, and a NaN is above all.

Shape letters: N rows, V numbers of a row, S blocks of a row.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Not measured yet: 16 rows of DeepSeek's vocabulary are 1008 programs of 8 KiB.
BLOCK_SIZE, NUM_WARPS = 2048, 4
NAN_KEY: tl.constexpr = tl.constexpr(0x7FFFFFFF)
LOWEST_KEY: tl.constexpr = tl.constexpr(-(2**31))  # below every number's
NO_PLACE: tl.constexpr = tl.constexpr(2**31 - 1)


def argmax_rows(x: torch.Tensor) -> torch.Tensor:
    """``x: [N, V]``, float32 or narrower, rows may be strided, V < 2^31 and not 0 -> [N] int64."""
    num_rows, size = x.shape
    places = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    if num_rows == 0:
        return places
    assert size > 0 and x.stride(1) == 1, (x.shape, x.stride())
    num_blocks = triton.cdiv(size, BLOCK_SIZE)
    best = torch.empty(num_rows, num_blocks, 2, dtype=torch.int32, device=x.device)
    _find_in_blocks_kernel[(num_blocks, num_rows)](
        x, best, size, x.stride(0), num_blocks, BLOCK=BLOCK_SIZE, num_warps=NUM_WARPS, launch_pdl=IS_ON
    )
    _find_block_kernel[(num_rows,)](
        best, places, num_blocks, BLOCK=triton.next_power_of_2(num_blocks), num_warps=1, launch_pdl=IS_ON
    )
    return places


@triton.jit
def _find_in_blocks_kernel(
    x,
    best,
    size,
    row_stride,
    num_blocks,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
):
    """``best: [N, S, 2]``: the largest key of a block, and its first place in the row."""
    let_next_start()
    wait_for_inputs()
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < size
    places = x + row * row_stride + columns
    # Without a mask but for the last block, whose end may lie at any number: a mask would forbid vectors.
    if (block + 1) * BLOCK <= size:  # noqa: SIM108 - Triton would load both
        values = tl.load(places)
    else:
        values = tl.load(places, mask=is_column, other=0.0)
    values = values.to(tl.float32)
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    keys = tl.where(values == values, bits ^ ((bits >> 31) & NAN_KEY), NAN_KEY)
    key, place = _first_of_highest(tl.where(is_column, keys, LOWEST_KEY), columns)
    entry = best + (row * num_blocks + block) * 2
    tl.store(entry, key)
    tl.store(entry + 1, place)


@triton.jit
def _find_block_kernel(
    best,
    places,
    num_blocks,
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK)
    is_block = blocks < num_blocks
    entries = best + (row * num_blocks + blocks) * 2
    keys = tl.load(entries, mask=is_block, other=LOWEST_KEY)
    _, place = _first_of_highest(keys, tl.load(entries + 1, mask=is_block, other=NO_PLACE))
    tl.store(places + row, place.to(tl.int64))


@triton.jit
def _first_of_highest(keys, places):
    highest = tl.max(keys, axis=0)
    return highest, tl.min(tl.where(keys == highest, places, NO_PLACE), axis=0)
