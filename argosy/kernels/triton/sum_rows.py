"""The weighted sum of chosen rows, in one pass: what combine does to the experts' output, and to what comes home.

In plain torch this gathers, widens, masks and multiplies, five passes over N * S rows; here each row is read once. Of
rows that came from other ranks most have no expert here, and the others one or two: their lines take a way of their
own, which spends nothing on what is not there. Invariant: summands are added in float32 in the order of ``row_ids``,
then the addend, so the result does not depend on the launch.

Shape letters: R rows, D hidden, N lines, S summands of a line.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Numbers of a line that a program adds, and its warps: of full lines, whose rows are all read at once, and of sparse
# ones, where looking for rows costs more than reading them. One of 16 ranks, 64 and 128 tokens each, on an H200: 6.2
# and 10.1 us, in blocks of 8,192 7.0 and 11.0, of 2,048 in 4 warps 6.8 and 11.6.
FULL_BLOCK, FULL_WARPS = 1024, 4
SPARSE_BLOCK, SPARSE_WARPS = 4096, 8


def sum_rows(
    rows: torch.Tensor,
    row_ids: torch.Tensor,
    weights: torch.Tensor | None,
    dtype: torch.dtype,
    addend: torch.Tensor | None = None,
    *,
    is_sparse: bool = False,
    skips_empty: bool = False,
) -> torch.Tensor:
    """``rows: [R, D]``, ``row_ids: [N, S]`` int (-1 none), ``weights: [N, S]`` f32 or None for ones, ``addend: [N, D]``
    of any float, contiguous, added last -> [N, D].

    Rows that no id names are never read. ``row_ids`` and ``weights`` may be strided. ``is_sparse``: most ids are -1; it
    decides how lines are worked on, and changes no number. ``skips_empty``: sparse lines of -1 stay unwritten.
    """
    assert not (skips_empty and addend is not None), "an empty line is its addend"
    num_lines, num_summands = row_ids.shape
    hidden_size = rows.shape[1]
    out = rows.new_empty(num_lines, hidden_size, dtype=dtype)
    if num_lines == 0:
        return out
    has_weights = weights is not None
    factors = weights if weights is not None else row_ids  # never read without weights; a launch needs a pointer
    block = min(SPARSE_BLOCK, triton.next_power_of_2(hidden_size)) if is_sparse else FULL_BLOCK
    num_blocks = triton.cdiv(hidden_size, block)
    _sum_rows_kernel[(num_lines * num_blocks,)](
        rows,
        row_ids,
        factors,
        rows if addend is None else addend,
        out,
        hidden_size,
        rows.stride(0),
        row_ids.stride(0),
        row_ids.stride(1),
        factors.stride(0),
        factors.stride(1),
        NUM_SUMMANDS=num_summands,
        HAS_WEIGHTS=has_weights,
        HAS_ADDEND=addend is not None,
        IS_SPARSE=is_sparse,
        SKIPS_EMPTY=skips_empty,
        NUM_BLOCKS=num_blocks,
        BLOCK=block,
        num_warps=SPARSE_WARPS if is_sparse else FULL_WARPS,
        launch_pdl=IS_ON,
    )
    return out


@triton.jit
def _sum_rows_kernel(
    rows,
    row_ids,
    weights,
    addend,
    out,
    hidden_size,
    row_stride,
    id_line_stride,
    id_summand_stride,
    weight_line_stride,
    weight_summand_stride,
    NUM_SUMMANDS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    HAS_WEIGHTS: tl.constexpr,  # noqa: N803
    HAS_ADDEND: tl.constexpr,  # noqa: N803
    IS_SPARSE: tl.constexpr,  # noqa: N803
    SKIPS_EMPTY: tl.constexpr,  # noqa: N803
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    # Neighbours work on one line, so that what is in flight lies together in memory.
    line = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    columns = (tl.program_id(0) % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < hidden_size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    line_weights = weights + line * weight_line_stride
    if IS_SPARSE:
        ids = row_ids + line * id_line_stride
        highest = tl.load(ids).to(tl.int32)
        for summand in tl.static_range(1, NUM_SUMMANDS):  # all are asked for before the first has come
            highest = tl.maximum(highest, tl.load(ids + summand * id_summand_stride).to(tl.int32))
        if SKIPS_EMPTY & (highest < 0):
            return
        if highest >= 0:
            for summand in tl.static_range(NUM_SUMMANDS):
                row = tl.load(ids + summand * id_summand_stride).to(tl.int64)
                if row >= 0:
                    values = tl.load(rows + row * row_stride + columns, mask=is_column, other=0.0).to(tl.float32)
                    if HAS_WEIGHTS:
                        values *= tl.load(line_weights + summand * weight_summand_stride)
                    total += values
    else:
        for summand in tl.static_range(NUM_SUMMANDS):
            row = tl.load(row_ids + line * id_line_stride + summand * id_summand_stride).to(tl.int64)
            # A masked load reads nothing, so a NaN in a row that nobody owns stays there.
            values = tl.load(rows + row * row_stride + columns, mask=is_column & (row >= 0), other=0.0).to(tl.float32)
            if HAS_WEIGHTS:
                values *= tl.load(line_weights + summand * weight_summand_stride)
            total += values
    if HAS_ADDEND:
        total += tl.load(addend + line * hidden_size + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + line * hidden_size + columns, total.to(out.dtype.element_ty), mask=is_column)
