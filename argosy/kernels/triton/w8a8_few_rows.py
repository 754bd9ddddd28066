"""INT8 x INT8 products of few rows with one weight: every multiprocessor streams weights, whatever the weight's shape.

Up to 16 rows, narrow columns give enough programs: each walks all of K, its warps a slice each, and nothing is shared.
Beyond, wide columns spare reading the rows again, K is split over programs, and a second kernel adds their int32 parts.
Integer sums are exact in any order. Invariant: a row's result depends on that row and the weights and nothing else.

Shape letters: M rows, K in_features, N out_features, S splits of K.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from argosy.kernels.triton.card import count_multiprocessors
from argosy.kernels.triton.dependent_launch import IS_ON, LINE_BYTES, fetch_lines, let_next_start, wait_for_inputs

MAX_ROWS = 256
INTERPRETED_MULTIPROCESSORS = 4  # few enough that tests reach every rule below
SUM_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class NarrowTile:
    """One program's columns over all of K; ``block_k`` is cut into a slice for each warp."""

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    block_rows: int = 16


@dataclass(frozen=True, slots=True)
class SplitTile:
    """One program's columns over a split of K, which has ``min_split`` numbers at least: parts cost their writing."""

    block_rows: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    min_split: int
    num_resident: int = 1  # programs on a multiprocessor, which fill each other's beginnings and ends


# The first that gives NARROW_SHARE of the multiprocessors a program, else the last. Not measured yet.
NARROW_SHARE = 0.7
NARROW_TILES = (
    NarrowTile(64, 256, 6, 4),
    NarrowTile(32, 512, 6, 4),
    NarrowTile(16, 512, 8, 4),
)
MAX_NARROW_ROWS = NARROW_TILES[0].block_rows
# By rows, the first entry that is not below them. One after another in a graph on an H200, 64 rows, and in place of
# this one 128 columns with six blocks of 128 numbers: 1536 -> 8192 5.9 and 7.2 us, 2048 -> 7168 6.7 and 8.3, 7168 ->
# 2240 8.5 and 9.8, 7168 -> 4096 11.1 and 12.7, 16384 -> 7168 34.5 and 34.4. 128 rows, and 64 columns with eight such
# blocks: 6.9 and 7.3, 7.8 and 8.3, 10.2 and 10.8, 13.1 and 13.7, 39.0 and 40.9. The others were not measured.
SPLIT_TILES = (
    SplitTile(32, 128, 256, 4, 4, 512),
    SplitTile(64, 64, 256, 4, 4, 2048),
    SplitTile(128, 64, 256, 4, 4, 2048),
    SplitTile(256, 128, 128, 4, 8, 1024),
)
# In place of these for so many columns: 1536 -> 24576 19.4 instead of 23.3 us, and 20.6 instead of 26.9.
WIDE_FEATURES = 16384
WIDE_SPLIT_TILES = {
    64: SplitTile(64, 64, 128, 4, 4, 512, num_resident=3),
    128: SplitTile(128, 64, 128, 3, 4, 512, num_resident=3),
}


def w8a8_few_rows(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    tile: NarrowTile | SplitTile | None = None,
) -> torch.Tensor:
    """``x: [M, K]`` int8 with M <= ``MAX_ROWS``, ``x_scale: [M, 1]`` f32, ``weight: [N, K]`` int8, ``weight_scale:
    [N, 1]`` f32 -> [M, N] in ``out_dtype``. K must be a multiple of 16; all are contiguous. No host sync."""
    num_rows, out_features = x.shape[0], weight.shape[0]
    out = torch.empty(num_rows, out_features, dtype=out_dtype, device=x.device)
    if num_rows == 0:
        return out
    num_multiprocessors = count_multiprocessors(x.device.index) if x.is_cuda else INTERPRETED_MULTIPROCESSORS
    tile = tile or choose_tile(num_rows, out_features, num_multiprocessors)
    if isinstance(tile, NarrowTile):
        _multiply_narrow(x, x_scale, weight, weight_scale, out, tile)
    else:
        _multiply_split(x, x_scale, weight, weight_scale, out, tile, num_multiprocessors)
    return out


def choose_tile(num_rows: int, out_features: int, num_multiprocessors: int) -> NarrowTile | SplitTile:
    if num_rows > MAX_NARROW_ROWS:
        tile = next(tile for tile in SPLIT_TILES if num_rows <= tile.block_rows)
        return WIDE_SPLIT_TILES.get(tile.block_rows, tile) if out_features >= WIDE_FEATURES else tile
    min_programs = NARROW_SHARE * num_multiprocessors
    return next((tile for tile in NARROW_TILES if out_features >= tile.block_n * min_programs), NARROW_TILES[-1])


def choose_split(tile: SplitTile, in_features: int, out_features: int, num_multiprocessors: int) -> int:
    """Numbers of K for each program, a multiple of ``block_k``, such that all programs run at once where they can."""
    num_splits = max(1, tile.num_resident * num_multiprocessors // triton.cdiv(out_features, tile.block_n))
    split = max(triton.cdiv(in_features, num_splits), tile.min_split)
    return triton.cdiv(split, tile.block_k) * tile.block_k


def _multiply_narrow(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
    tile: NarrowTile,
) -> None:
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    _narrow_kernel[(triton.cdiv(out_features, tile.block_n),)](
        x,
        weight,
        x_scale,
        weight_scale,
        out,
        num_rows,
        out_features,
        in_features,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_N=tile.block_n,
        SLICE=tile.block_k // tile.num_warps,
        NUM_SLICES=tile.num_warps,
        FETCHED_LINES=_power_of_two_below((tile.num_stages - 1) * tile.block_k // LINE_BYTES.value),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=IS_ON,
    )


def _multiply_split(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
    tile: SplitTile,
    num_multiprocessors: int,
) -> None:
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    split = choose_split(tile, in_features, out_features, num_multiprocessors)
    num_splits = triton.cdiv(in_features, split)
    parts = out
    if num_splits > 1:
        parts = torch.empty(num_splits, num_rows, out_features, dtype=torch.int32, device=x.device)
    _split_kernel[(triton.cdiv(out_features, tile.block_n), num_splits)](
        TensorDescriptor(x, [num_rows, in_features], [in_features, 1], [tile.block_rows, tile.block_k]),
        TensorDescriptor(weight, [out_features, in_features], [in_features, 1], [tile.block_n, tile.block_k]),
        x_scale,
        weight_scale,
        parts,
        num_rows,
        out_features,
        in_features,
        split,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        IS_WHOLE=num_splits == 1,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=IS_ON,
    )
    if num_splits > 1:
        _sum_scaled_kernel[(triton.cdiv(out_features, SUM_BLOCK), num_rows)](
            parts,
            x_scale,
            weight_scale,
            out,
            num_rows,
            out_features,
            NUM_SPLITS=num_splits,
            BLOCK=SUM_BLOCK,
            num_warps=4,
            launch_pdl=IS_ON,
        )


def _power_of_two_below(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)


@triton.jit(do_not_specialize=["num_rows"])
def _narrow_kernel(
    x,
    weight,
    x_scale,
    weight_scale,
    out,
    num_rows,
    out_features,
    in_features,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK_N: tl.constexpr,  # noqa: N803
    SLICE: tl.constexpr,  # noqa: N803
    NUM_SLICES: tl.constexpr,  # noqa: N803
    FETCHED_LINES: tl.constexpr,  # noqa: N803
):
    let_next_start()
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    _fetch_first_weights(weight, columns, out_features, in_features, FETCHED_LINES)
    wait_for_inputs()
    row_ids = tl.arange(0, BLOCK_ROWS)
    is_column, is_row = columns < out_features, row_ids < num_rows
    # A batch of products, one for each warp's slice of K: a single short product would leave all warps but one idle.
    in_slice = tl.arange(0, NUM_SLICES)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]  # [NUM_SLICES, SLICE]
    weight_places = weight + columns.to(tl.int64)[None, :, None] * in_features + in_slice[:, None, :]
    row_places = x + row_ids[None, None, :] * in_features + in_slice[:, :, None]
    total = tl.zeros((NUM_SLICES, BLOCK_N, BLOCK_ROWS), dtype=tl.int32)
    for k in tl.range(0, in_features, NUM_SLICES * SLICE):
        is_k = in_slice < in_features - k
        weights = tl.load(weight_places + k, mask=is_column[None, :, None] & is_k[:, None, :], other=0)
        rows = tl.load(row_places + k, mask=is_row[None, None, :] & is_k[:, :, None], other=0)
        total = tl.dot(weights, rows, total, out_dtype=tl.int32)
    whole = tl.trans(tl.sum(total, axis=0))  # [BLOCK_ROWS, BLOCK_N]
    row_scale = tl.load(x_scale + row_ids, mask=is_row, other=0.0)
    column_scale = tl.load(weight_scale + columns, mask=is_column, other=0.0)
    value = _scale(whole, row_scale[:, None], column_scale[None, :])
    places = out + row_ids[:, None] * out_features + columns[None, :]
    tl.store(places, value.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _fetch_first_weights(weight, columns, out_features, in_features, FETCHED_LINES: tl.constexpr):  # noqa: N803
    """What the walk begins with depends on no kernel: it is on its way while the rows are still being made."""
    k = tl.minimum(tl.arange(0, FETCHED_LINES) * LINE_BYTES, in_features - 1)
    rows = tl.minimum(columns, out_features - 1).to(tl.int64)
    fetch_lines(weight + rows[:, None] * in_features + k[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _split_kernel(
    x_tiles,
    weight_tiles,
    x_scale,
    weight_scale,
    parts,
    num_rows,
    out_features,
    in_features,
    split,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    IS_WHOLE: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    column = tl.program_id(0) * BLOCK_N
    first_k = tl.program_id(1) * split
    total = tl.zeros((BLOCK_N, BLOCK_ROWS), dtype=tl.int32)
    # What lies behind a tensor's end reads as 0.
    for k in tl.range(first_k, tl.minimum(first_k + split, in_features), BLOCK_K):
        total = tl.dot(weight_tiles.load([column, k]), x_tiles.load([0, k]).T, total, out_dtype=tl.int32)
    total = tl.trans(total)
    row_ids = tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, BLOCK_N)
    is_row, is_column = row_ids < num_rows, columns < out_features
    is_mine = is_row[:, None] & is_column[None, :]
    places = row_ids[:, None] * out_features + columns[None, :]
    if IS_WHOLE:
        row_scale = tl.load(x_scale + row_ids, mask=is_row, other=0.0)
        column_scale = tl.load(weight_scale + columns, mask=is_column, other=0.0)
        value = _scale(total, row_scale[:, None], column_scale[None, :])
        tl.store(parts + places, value.to(parts.dtype.element_ty), mask=is_mine)
    else:
        tl.store(parts + tl.program_id(1).to(tl.int64) * num_rows * out_features + places, total, mask=is_mine)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_scaled_kernel(
    parts,
    x_scale,
    weight_scale,
    out,
    num_rows,
    out_features,
    NUM_SPLITS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < out_features
    places = row * out_features + columns
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + split * num_rows * out_features + places, mask=is_column, other=0)
    column_scale = tl.load(weight_scale + columns, mask=is_column, other=0.0)
    value = _scale(total, tl.load(x_scale + row), column_scale)
    tl.store(out + places, value.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _scale(total, row_scale, column_scale):
    # NOTE(numerics): the row's scale first, then the column's, as the reference does.
    return total.to(tl.float32) * row_scale * column_scale
