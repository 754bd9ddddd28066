"""INT8 x INT8 products of sorted rows with their expert's weights, on Hopper's integer tensor instruction.

One persistent kernel serves dense linears of many rows (one expert; ``w8a8_few_rows.py`` has the others), experts in
prefill (many rows each) and in decode (few rows each: weights take the instruction's long side, 64 rows at least, and
tokens its short one). Sums are exact in int32; scales come in after. On a Hopper card many rows go through
``w8a8_hopper.py``; the kernel here is its portable twin. Invariant: a row's result depends on that row, its expert's
weights and nothing else.

Shape letters: M sorted rows, D in_features, N out_features of a row, e experts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from argosy.kernels.triton.card import capability, count_multiprocessors
from argosy.kernels.triton.dependent_launch import IS_ON
from argosy.kernels.triton.expert_rows import count_usual_rows
from argosy.kernels.triton.hopper_tiles import HopperTile
from argosy.kernels.triton.tile_queue import find_tile_queue, pad_experts
from argosy.kernels.triton.w8a8_hopper import multiply_on_hopper

HOPPER = 90
IN_FEATURES_MULTIPLE = 16  # what the card's tile loads ask of a row of bytes
INTERPRETED_PROGRAMS = 4  # few enough that each does several tiles


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's piece of the output and how it walks. ``block_n``: of each half, when gate and up are fused."""

    block_rows: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    is_swapped: bool  # weights on the instruction's long side
    group_rows: int = 8  # row tiles that are walked together, for the cache's sake
    tail_rows: int = 0  # an expert's last tile is this short where its rows fit; 0: never
    is_flat: bool = False  # the next tile's loads start before this one's results are written
    # Programs on a multiprocessor, to fill each other's waits. Where sums are integers, Triton (3.6, 3.7.1) waits for a
    # block of products before the next one; where they are float32 it does not.
    num_resident: int = 1


# The first whose rows hold what an expert usually gets (``count_usual_rows``): a second tile streams its weights again.
# That of 16 rows and the wide tiles were chosen by measuring on an H200 (docs/log.md); those between are set between.
PLAIN_TILES = (
    Tile(16, 128, 256, 4, 4, True),
    Tile(32, 128, 256, 4, 4, True),
    Tile(64, 128, 128, 6, 4, True),
    Tile(128, 128, 128, 4, 4, True),
)
PLAIN_WIDE_TILE = Tile(128, 256, 128, 4, 8, False, 4)
GATED_TILES = (
    Tile(16, 64, 256, 4, 4, True),
    Tile(32, 64, 256, 4, 4, True),
    Tile(64, 64, 128, 5, 4, True),
)
GATED_WIDE_TILE = Tile(128, 128, 128, 3, 8, False)
# On a Hopper card, for experts that usually get more rows than these. Measured on an H200, in one run of a model,
# without queues: dense linears of 4,096 rows 1,460 to 1,625 TOP/s; 256 experts 685 with 128 rows on average, 800 with
# 256. One of 16 ranks, 64 tokens each, which counts 43 rows: gate and up 127 us, down 74, where the tiles above take
# 140 and 83; 128 tokens 133 and 80.
HOPPER_ROWS = 43
HOPPER_PLAIN_TILE = HopperTile(walked_tiles=4)
HOPPER_GATED_TILE = HopperTile()
# In place of these while experts usually get no more rows: twice the tiles, so that all programs end together, and
# only the rows that there are. One of 16 ranks, 64 and 128 tokens each, in a graph: down 61.3 and 65.5 us, 63.7 and
# 70.9 with the tile above, gate and up 116.9, and with boxes of 16 rows 122.5, where that takes 118.7 and 126.4.
FEW_HOPPER_ROWS = 96
FEW_ROWS_HOPPER_TILE = HopperTile(box_n=64, num_stages=6, box_rows=32, walked_tiles=4)


def w8a8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    num_rows_per_expert: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    is_gated: bool = False,
    num_expected_rows: int | None = None,
    tile: Tile | HopperTile | None = None,
) -> torch.Tensor:
    """``x: [M, D]`` int8 sorted by expert, ``x_scale: [M, 1]`` f32, ``weight: [e, N, D]`` int8, ``weight_scale:
    [e, N, 1]`` f32, counts [e] int32 (None: one expert has all rows) -> [M, N] in ``out_dtype``.

    ``is_gated``: silu of the first half of N times the second: [M, N / 2]. Rows behind the counts' sum stay unwritten.
    ``num_expected_rows``: about the counts' sum, for the choice of a tile; None: M. D must be a multiple of
    ``IN_FEATURES_MULTIPLE``; all are contiguous. No host sync.
    """
    num_rows, in_features = x.shape
    num_experts, out_features, _ = weight.shape
    num_columns = out_features // 2 if is_gated else out_features
    out = torch.empty(num_rows, num_columns, dtype=out_dtype, device=x.device)
    if num_rows == 0:
        return out
    if tile is None:
        is_hopper = x.is_cuda and capability() == HOPPER
        tile = choose_tile(
            num_rows if num_expected_rows is None else num_expected_rows, num_experts, is_gated, is_hopper
        )
    if isinstance(tile, HopperTile):
        _launch_on_hopper(x, x_scale, weight, weight_scale, num_rows_per_expert, out, is_gated, tile)
        return out
    weight_block = [tile.block_n, tile.block_k]
    x_tiles, tail_tiles = (
        TensorDescriptor(x, [num_rows, in_features], [in_features, 1], [block_rows, tile.block_k])
        for block_rows in (tile.block_rows, tile.tail_rows or tile.block_rows)
    )
    weight_tiles = TensorDescriptor(weight, [num_experts * out_features, in_features], [in_features, 1], weight_block)
    counts = x_scale if num_rows_per_expert is None else num_rows_per_expert  # a launch needs a pointer
    num_programs = count_multiprocessors(x.device.index) if x.is_cuda else INTERPRETED_PROGRAMS
    _w8a8_kernel[(num_programs * tile.num_resident,)](
        x_tiles,
        tail_tiles,
        weight_tiles,
        x_scale,
        weight_scale,
        counts,
        out,
        num_rows,
        num_experts,
        num_columns,
        out_features,
        in_features,
        NUM_EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_ROWS=tile.group_rows,
        TAIL_ROWS=tile.tail_rows,
        IS_FLAT=tile.is_flat,
        IS_SWAPPED=tile.is_swapped,
        IS_GATED=is_gated,
        IS_DENSE=num_rows_per_expert is None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def choose_tile(num_rows: int, num_experts: int, is_gated: bool, is_hopper: bool = False) -> Tile | HopperTile:
    """From what the host knows: the rows, not how they are spread."""
    rows = count_usual_rows(num_rows, num_experts)
    if is_hopper and num_experts > 1 and HOPPER_ROWS < rows <= FEW_HOPPER_ROWS:
        return FEW_ROWS_HOPPER_TILE
    if is_hopper and rows > HOPPER_ROWS:
        return HOPPER_GATED_TILE if is_gated else HOPPER_PLAIN_TILE
    tiles = GATED_TILES if is_gated else PLAIN_TILES
    wide = GATED_WIDE_TILE if is_gated else PLAIN_WIDE_TILE
    return next((tile for tile in tiles if rows <= tile.block_rows), wide)


def _launch_on_hopper(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    num_rows_per_expert: torch.Tensor | None,
    out: torch.Tensor,
    is_gated: bool,
    tile: HopperTile,
) -> None:
    num_experts, out_features, in_features = weight.shape
    x_tiles, weight_tiles = (
        GluonDescriptor.from_tensor(matrix, block, gl.NVMMASharedLayout.get_default_for(block, gl.int8))
        for matrix, block in (
            (x, [tile.box_rows, tile.block_k]),
            (weight.view(-1, in_features), [tile.box_n, tile.block_k]),
        )
    )
    num_programs = count_multiprocessors(x.device.index) if x.is_cuda else INTERPRETED_PROGRAMS
    is_dense = num_rows_per_expert is None
    has_queue = tile.has_queue and not is_dense
    multiply_on_hopper[(num_programs,)](
        x_tiles,
        weight_tiles,
        x_scale,
        weight_scale,
        x_scale if is_dense else num_rows_per_expert,  # a launch needs a pointer
        find_tile_queue(x.device) if has_queue else x_scale,
        out,
        len(x),
        num_experts,
        out.shape[1],
        out_features,
        in_features,
        WALKED_TILES=tile.walked_tiles,
        NUM_STAGES=tile.num_stages,
        LEAD=tile.lead,
        HAS_QUEUE=has_queue,
        PADDED_EXPERTS=pad_experts(num_experts),
        IS_GATED=is_gated,
        IS_DENSE=is_dense,
        num_warps=4,
        launch_pdl=IS_ON,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _w8a8_kernel(
    x_tiles,
    tail_tiles,
    weight_tiles,
    x_scale,
    weight_scale,
    counts,
    out,
    num_rows,
    num_experts,
    num_columns,
    out_features,
    in_features,
    NUM_EXPERTS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    GROUP_ROWS: tl.constexpr,  # noqa: N803
    TAIL_ROWS: tl.constexpr,  # noqa: N803
    IS_FLAT: tl.constexpr,  # noqa: N803
    IS_SWAPPED: tl.constexpr,  # noqa: N803
    IS_GATED: tl.constexpr,  # noqa: N803
    IS_DENSE: tl.constexpr,  # noqa: N803
):
    experts = tl.arange(0, NUM_EXPERTS)
    count = experts * 0 + num_rows
    if not IS_DENSE:
        count = tl.load(counts + experts, mask=experts < num_experts, other=0)
    row_tiles = (count + BLOCK_ROWS - 1) // BLOCK_ROWS
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    last_tile = tl.cumsum(row_tiles) * column_tiles  # behind each expert's
    num_tiles = tl.sum(row_tiles) * column_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_FLAT):
        expert = tl.sum((last_tile <= tile).to(tl.int32))
        is_before = experts < expert
        is_mine = experts == expert
        place = tile - tl.sum(tl.where(is_before, row_tiles, 0)) * column_tiles
        expert_tiles = tl.sum(tl.where(is_mine, row_tiles, 0))
        group = place // (GROUP_ROWS * column_tiles)
        group_size = tl.minimum(expert_tiles - group * GROUP_ROWS, GROUP_ROWS)
        place_in_group = place - group * GROUP_ROWS * column_tiles
        row_tile = group * GROUP_ROWS + place_in_group % group_size
        column = (place_in_group // group_size) * BLOCK_N
        first_row = tl.sum(tl.where(is_before, count, 0))
        row = first_row + row_tile * BLOCK_ROWS
        stop_row = first_row + tl.sum(tl.where(is_mine, count, 0))
        if TAIL_ROWS > 0:
            if stop_row - row <= TAIL_ROWS:
                _compute_tile(
                    tail_tiles, weight_tiles, x_scale, weight_scale, out, row, stop_row, expert, column, num_columns,
                    out_features, in_features, TAIL_ROWS, BLOCK_N, BLOCK_K, IS_SWAPPED, IS_GATED,
                )  # fmt: skip
            else:
                _compute_tile(
                    x_tiles, weight_tiles, x_scale, weight_scale, out, row, stop_row, expert, column, num_columns,
                    out_features, in_features, BLOCK_ROWS, BLOCK_N, BLOCK_K, IS_SWAPPED, IS_GATED,
                )  # fmt: skip
        else:
            _compute_tile(
                x_tiles, weight_tiles, x_scale, weight_scale, out, row, stop_row, expert, column, num_columns,
                out_features, in_features, BLOCK_ROWS, BLOCK_N, BLOCK_K, IS_SWAPPED, IS_GATED,
            )  # fmt: skip


@triton.jit
def _compute_tile(
    x_tiles,
    weight_tiles,
    x_scale,
    weight_scale,
    out,
    row,
    stop_row,
    expert,
    column,
    num_columns,
    out_features,
    in_features,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    IS_SWAPPED: tl.constexpr,  # noqa: N803
    IS_GATED: tl.constexpr,  # noqa: N803
):
    weight_row = expert * out_features + column

    # What lies behind a tensor's end reads as 0; what is another expert's is computed and not stored.
    if IS_SWAPPED:
        total = tl.zeros((BLOCK_N, BLOCK_ROWS), dtype=tl.int32)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.int32)
    up_total = total
    for k in tl.range(0, in_features, BLOCK_K):
        rows = x_tiles.load([row, k])
        weights = weight_tiles.load([weight_row, k])
        if IS_SWAPPED:
            total = tl.dot(weights, rows.T, total, out_dtype=tl.int32)
        else:
            total = tl.dot(rows, weights.T, total, out_dtype=tl.int32)
        if IS_GATED:
            up_weights = weight_tiles.load([weight_row + num_columns, k])
            if IS_SWAPPED:
                up_total = tl.dot(up_weights, rows.T, up_total, out_dtype=tl.int32)
            else:
                up_total = tl.dot(rows, up_weights.T, up_total, out_dtype=tl.int32)

    row_ids = row + tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, BLOCK_N)
    is_row = row_ids < stop_row
    is_column = columns < num_columns
    row_scale = tl.load(x_scale + row_ids, mask=is_row, other=0.0)
    column_scales = weight_scale + expert * out_features + columns
    value = _scale(total, row_scale, tl.load(column_scales, mask=is_column, other=0.0), IS_SWAPPED)
    if IS_GATED:
        up_scale = tl.load(column_scales + num_columns, mask=is_column, other=0.0)
        up = _scale(up_total, row_scale, up_scale, IS_SWAPPED)
        value = value * tl.sigmoid(value) * up
    if IS_SWAPPED:
        value = tl.trans(value)
    places = out + row_ids[:, None].to(tl.int64) * num_columns + columns[None, :]
    tl.store(places, value.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _scale(total, row_scale, column_scale, IS_SWAPPED: tl.constexpr):  # noqa: N803
    # NOTE(numerics): the row's scale first, then the column's, as the reference does.
    if IS_SWAPPED:
        value = total.to(tl.float32) * row_scale[None, :] * column_scale[:, None]
    else:
        value = total.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    return value
