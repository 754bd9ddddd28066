"""e4m3 x e4m3 products of sorted rows with their expert's weights, scaled per 128 inputs, on Hopper's tensor cores.

One persistent kernel serves dense linears (one expert; with few rows K is split, so that all multiprocessors stream
weights) and experts in prefill and decode (few rows: weights take the instruction's long side, tokens its short one).
On a Hopper card, many rows go through ``fp8_hopper.py``; the kernel here is its portable twin.
The tensor cores sum 128 products; ordinary float32 units scale such a sum and add it to the total (DeepSeek-V3,
section 3.3.2). A tile of two column blocks needs the registers of one such sum only. Invariant: a row's result depends
on that row, its expert's weights, and through the tile on how many rows there are; on no other row.

Shape letters: M sorted rows, K in_features, N out_features of a row, F = N / 2, e experts, S splits of K.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from argosy.kernels.reference_fp8 import BLOCK_SIZE
from argosy.kernels.triton.card import capability, count_multiprocessors
from argosy.kernels.triton.dependent_launch import IS_ON
from argosy.kernels.triton.expert_rows import count_usual_rows
from argosy.kernels.triton.fp8_hopper import Fp8HopperTile, multiply_fp8_on_hopper
from argosy.kernels.triton.quantize_groups import empty_groups, quantize_last_dim
from argosy.kernels.triton.tile_queue import find_tile_queue, pad_experts

HOPPER = 90
BLOCK_K: tl.constexpr = tl.constexpr(BLOCK_SIZE)
IN_FEATURES_MULTIPLE = 16  # what the card's tile loads ask of a row of bytes
INTERPRETED_MULTIPROCESSORS = 2  # few enough that each program does several tiles
MIN_SPLIT_BLOCKS = 4  # of K: a shorter walk is mostly its beginning
SUM_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's piece of the output and how it walks. ``is_halved``: two column blocks of ``block_n`` each."""

    block_rows: int
    block_n: int
    num_stages: int
    num_warps: int
    is_swapped: bool  # weights on the instruction's long side
    is_halved: bool
    num_programs: int  # of a multiprocessor
    group_rows: int = 8  # row tiles that are walked together, for the cache's sake
    num_unrolled: int = 1  # blocks of K in one step of the walk; a stage holds as many


# The first whose rows hold what an expert usually gets (``count_usual_rows``): a second tile streams its weights again.
# Those of 16 rows were measured on an H200: 704 and 1,424 us for 64 tokens of 256 experts; the others are set between.
PLAIN_TILES = (
    Tile(16, 128, 3, 4, True, False, 3),
    Tile(32, 128, 4, 4, True, False, 2),
    Tile(64, 128, 4, 4, True, False, 2),
)
PLAIN_WIDE_TILE = Tile(128, 128, 4, 8, False, True, 1, 4)
# Gate and up are the halves; 128 hidden numbers are one group of what is quantised next.
GATED_TILES = (
    Tile(16, 128, 3, 4, True, True, 2),
    Tile(32, 128, 5, 8, True, True, 1),
    Tile(64, 128, 5, 8, True, True, 1),
)
# While most experts are idle, tiles are few: 75 us for one token there, 95 with the tile above.
GATED_IDLE_TILE = Tile(16, 128, 6, 4, True, True, 1)
IDLE_ROWS = 0.25  # an expert, on average
GATED_WIDE_TILE = Tile(128, 128, 4, 8, False, True, 1)
# On a Hopper card, for experts that usually get more rows than these. 4,096 rows on an H200 with 1, 2 and 4 blocks of K
# in a stretch: 7168 -> 4096 213, 203 and 184 us, 16384 -> 7168 920, 850 and 836; 8,192 tokens' experts, gate and up
# 4,492, 4,190 and 4,594, down 2,408, 2,105 and 2,300.
HOPPER_ROWS = 64
HOPPER_DENSE_TILE = Fp8HopperTile(walked_tiles=4, num_unrolled=4)
HOPPER_PLAIN_TILE = Fp8HopperTile(num_unrolled=2)
HOPPER_GATED_TILE = Fp8HopperTile(num_unrolled=2)


def fp8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    num_rows_per_expert: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    is_gated: bool = False,
    num_expected_rows: int | None = None,
    tile: Tile | Fp8HopperTile | None = None,
) -> torch.Tensor:
    """``x: [M, K]`` e4m3 sorted by expert, ``x_scale: [M, ceil(K / 128)]`` f32 of any strides, ``weight: [e, N, K]``
    e4m3, ``weight_scale_inv: [e, ceil(N / 128), ceil(K / 128)]`` f32, counts [e] int32 (None: one expert has all rows)
    -> [M, N] in ``out_dtype``.

    ``is_gated``: silu of the first half of N times the second: [M, N / 2]; both halves are rounded to ``out_dtype``
    before, and must be whole blocks. Rows behind the counts' sum stay unwritten. ``num_expected_rows``: about that sum,
    for the choice of a tile; None: M. K must be a multiple of ``IN_FEATURES_MULTIPLE``; x and the weights are
    contiguous. No host sync.
    """
    num_expected_rows = x.shape[0] if num_expected_rows is None else num_expected_rows
    num_columns = weight.shape[1] // 2 if is_gated else weight.shape[1]
    is_dense = num_rows_per_expert is None and not is_gated
    if tile is None:
        tile = choose_tile(num_expected_rows, weight.shape[0], is_gated, _is_on_hopper(x))
        if is_dense and isinstance(tile, Fp8HopperTile) and _count_splits(PLAIN_WIDE_TILE, x, num_columns) > 1:
            tile = PLAIN_WIDE_TILE
    num_splits = _count_splits(tile, x, num_columns) if is_dense and isinstance(tile, Tile) else 1
    if num_splits == 1:
        out = torch.empty(x.shape[0], num_columns, dtype=out_dtype, device=x.device)
        _launch(x, x_scale, weight, weight_scale_inv, num_rows_per_expert, out, tile, is_gated=is_gated)
        return out
    parts = torch.empty(num_splits, x.shape[0], num_columns, dtype=torch.float32, device=x.device)
    _launch(x, x_scale, weight, weight_scale_inv, None, parts, tile, num_splits=num_splits)
    return _sum_splits(parts, out_dtype)


def fp8_grouped_gate_up(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    num_rows_per_expert: torch.Tensor | None,
    hidden_dtype: torch.dtype,
    *,
    has_ue8m0_scales: bool,
    num_expected_rows: int | None = None,
    tile: Tile | Fp8HopperTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``fp8_grouped_gemm`` with ``is_gated``, whose result of ``hidden_dtype`` is quantised where it is made.

    -> e4m3 [M, F], scale [M, F / 128] f32: what ``quantize_groups`` would give."""
    num_expected_rows = x.shape[0] if num_expected_rows is None else num_expected_rows
    tile = tile or choose_tile(num_expected_rows, weight.shape[0], True, _is_on_hopper(x))
    quantized, scale = empty_groups(x.shape[0], weight.shape[1] // 2, x.device)
    _launch(
        x,
        x_scale,
        weight,
        weight_scale_inv,
        num_rows_per_expert,
        quantized,
        tile,
        is_gated=True,
        out_scale=scale,
        hidden_dtype=hidden_dtype,
        has_ue8m0_scales=has_ue8m0_scales,
    )
    return quantized, scale


def choose_tile(num_rows: int, num_experts: int, is_gated: bool, is_hopper: bool = False) -> Tile | Fp8HopperTile:
    """From what the host knows: the rows, not how they are spread."""
    rows = count_usual_rows(num_rows, num_experts)
    if is_hopper and rows > HOPPER_ROWS:
        plain = HOPPER_DENSE_TILE if num_experts == 1 else HOPPER_PLAIN_TILE
        return HOPPER_GATED_TILE if is_gated else plain
    if is_gated and num_rows < IDLE_ROWS * num_experts:
        return GATED_IDLE_TILE
    tiles = GATED_TILES if is_gated else PLAIN_TILES
    wide = GATED_WIDE_TILE if is_gated else PLAIN_WIDE_TILE
    return next((tile for tile in tiles if rows <= tile.block_rows), wide)


def choose_num_splits(tile: Tile, x_shape: torch.Size, num_columns: int, num_programs: int) -> int:
    """How many pieces of K a dense product is cut into: 1 where its tiles already occupy the card."""
    num_rows, in_features = x_shape
    tile_columns = tile.block_n * (2 if tile.is_halved else 1)
    num_tiles = triton.cdiv(num_rows, tile.block_rows) * triton.cdiv(num_columns, tile_columns)
    num_blocks = triton.cdiv(in_features, BLOCK_SIZE)
    wanted = min(num_programs // max(num_tiles, 1), num_blocks // MIN_SPLIT_BLOCKS)
    if wanted <= 1 or num_rows == 0:
        return 1
    return triton.cdiv(num_blocks, triton.cdiv(num_blocks, wanted))  # none is empty


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    counts: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile | Fp8HopperTile,
    *,
    is_gated: bool = False,
    num_splits: int = 1,
    out_scale: torch.Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    has_ue8m0_scales: bool = False,
) -> None:
    num_rows, in_features = x.shape
    num_experts, out_features, _ = weight.shape
    if num_rows == 0:
        return
    assert not is_gated or out_features % (2 * BLOCK_SIZE) == 0, weight.shape
    hidden = getattr(tl, str(hidden_dtype or out.dtype).removeprefix("torch."))
    if isinstance(tile, Fp8HopperTile):
        inputs = x, x_scale, weight, weight_scale_inv, counts
        _launch_on_hopper(*inputs, out, out_scale, tile, is_gated, has_ue8m0_scales, hidden)
        return
    assert not is_gated or tile.is_halved, tile
    assert BLOCK_SIZE % tile.block_n == 0, tile  # a column block has one scale
    weight_rows = num_experts * out_features
    _fp8_kernel[(_count_programs(tile, x.device),)](
        TensorDescriptor(x, [num_rows, in_features], [in_features, 1], [tile.block_rows, BLOCK_SIZE]),
        TensorDescriptor(weight, [weight_rows, in_features], [in_features, 1], [tile.block_n, BLOCK_SIZE]),
        x_scale,
        weight_scale_inv,
        x_scale if counts is None else counts,  # a launch needs a pointer
        out,
        x_scale if out_scale is None else out_scale,
        num_rows,
        num_experts,
        out_features // 2 if is_gated else out_features,
        out_features,
        in_features,
        x_scale.stride(0),
        x_scale.stride(1),
        num_splits,
        NUM_EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_N=tile.block_n,
        GROUP_ROWS=tile.group_rows,
        NUM_UNROLLED=tile.num_unrolled,
        IS_SWAPPED=tile.is_swapped,
        IS_HALVED=tile.is_halved,
        IS_GATED=is_gated,
        IS_DENSE=counts is None,
        IS_QUANTIZED=out_scale is not None,
        HAS_UE8M0_SCALES=has_ue8m0_scales,
        HIDDEN_DTYPE=hidden,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _launch_on_hopper(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale_inv: torch.Tensor,
    counts: torch.Tensor | None,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    tile: Fp8HopperTile,
    is_gated: bool,
    has_ue8m0_scales: bool,
    hidden: tl.dtype,
) -> None:
    num_experts, out_features, in_features = weight.shape
    assert tile.box_n == tile.block_k == BLOCK_SIZE, tile  # a box has one scale
    x_tiles, weight_tiles = (
        GluonDescriptor.from_tensor(matrix, block, gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv))
        for matrix, block in (
            (x, [tile.box_rows, BLOCK_SIZE]),
            (weight.view(-1, in_features), [BLOCK_SIZE, BLOCK_SIZE]),
        )
    )
    num_programs = count_multiprocessors(x.device.index) if x.is_cuda else INTERPRETED_MULTIPROCESSORS
    has_queue = tile.has_queue and counts is not None
    multiply_fp8_on_hopper[(num_programs,)](
        x_tiles,
        weight_tiles,
        x_scale,
        weight_scale_inv,
        x_scale if counts is None else counts,  # a launch needs pointers
        find_tile_queue(x.device) if has_queue else x_scale,
        out,
        x_scale if out_scale is None else out_scale,
        len(x),
        num_experts,
        out.shape[1],
        out_features,
        in_features,
        x_scale.stride(0),
        x_scale.stride(1),
        WALKED_TILES=tile.walked_tiles,
        NUM_STAGES=tile.num_stages,
        LEAD=tile.lead,
        NUM_UNROLLED=tile.num_unrolled,
        HAS_QUEUE=has_queue,
        PADDED_EXPERTS=pad_experts(num_experts),
        IS_GATED=is_gated,
        IS_DENSE=counts is None,
        IS_QUANTIZED=out_scale is not None,
        HAS_UE8M0_SCALES=has_ue8m0_scales,
        HIDDEN_DTYPE=hidden,
        num_warps=4,
        launch_pdl=IS_ON,
    )


def _count_splits(tile: Tile, x: torch.Tensor, num_columns: int) -> int:
    return choose_num_splits(tile, x.shape, num_columns, _count_programs(tile, x.device))


def _is_on_hopper(x: torch.Tensor) -> bool:
    return x.is_cuda and capability() == HOPPER


def _sum_splits(parts: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """``parts: [S, M, N]`` f32 -> [M, N]: added in order, rounded once."""
    num_splits, num_rows, num_columns = parts.shape
    out = torch.empty(num_rows, num_columns, dtype=out_dtype, device=parts.device)
    size = out.numel()
    _sum_splits_kernel[(triton.cdiv(size, SUM_BLOCK),)](parts, out, size, num_splits, BLOCK=SUM_BLOCK, num_warps=4)
    return out


def _count_programs(tile: Tile, device: torch.device) -> int:
    count = INTERPRETED_MULTIPROCESSORS if device.type == "cpu" else count_multiprocessors(device.index)
    return count * tile.num_programs


@triton.jit(do_not_specialize=["num_rows", "x_scale_group_stride", "num_splits"])
def _fp8_kernel(
    x_tiles,
    weight_tiles,
    x_scale,
    weight_scale_inv,
    counts,
    out,
    out_scale,
    num_rows,
    num_experts,
    num_columns,
    out_features,
    in_features,
    x_scale_row_stride,
    x_scale_group_stride,
    num_splits,
    NUM_EXPERTS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    GROUP_ROWS: tl.constexpr,  # noqa: N803
    NUM_UNROLLED: tl.constexpr,  # noqa: N803
    IS_SWAPPED: tl.constexpr,  # noqa: N803
    IS_HALVED: tl.constexpr,  # noqa: N803
    IS_GATED: tl.constexpr,  # noqa: N803
    IS_DENSE: tl.constexpr,  # noqa: N803
    IS_QUANTIZED: tl.constexpr,  # noqa: N803
    HAS_UE8M0_SCALES: tl.constexpr,  # noqa: N803
    HIDDEN_DTYPE: tl.constexpr,  # noqa: N803
):
    experts = tl.arange(0, NUM_EXPERTS)
    count = experts * 0 + num_rows
    if not IS_DENSE:
        count = tl.load(counts + experts, mask=experts < num_experts, other=0)
    row_tiles = (count + BLOCK_ROWS - 1) // BLOCK_ROWS
    tile_columns: tl.constexpr = BLOCK_N * 2 if IS_HALVED and not IS_GATED else BLOCK_N
    column_tiles = tl.cdiv(num_columns, tile_columns)
    last_tile = tl.cumsum(row_tiles) * column_tiles  # behind each expert's
    num_tiles = tl.sum(row_tiles) * column_tiles
    num_blocks = tl.cdiv(in_features, BLOCK_K)
    split_blocks = tl.cdiv(num_blocks, num_splits)
    scale_rows = tl.cdiv(out_features, BLOCK_K)
    right_offset = BLOCK_N
    if IS_GATED:
        right_offset = num_columns
    for piece in tl.range(tl.program_id(0), num_tiles * num_splits, tl.num_programs(0)):
        tile = piece // num_splits
        split = piece % num_splits
        expert = tl.sum((last_tile <= tile).to(tl.int32))
        is_before = experts < expert
        is_mine = experts == expert
        place = tile - tl.sum(tl.where(is_before, row_tiles, 0)) * column_tiles
        expert_tiles = tl.sum(tl.where(is_mine, row_tiles, 0))
        group = place // (GROUP_ROWS * column_tiles)
        group_size = tl.minimum(expert_tiles - group * GROUP_ROWS, GROUP_ROWS)
        place_in_group = place - group * GROUP_ROWS * column_tiles
        row_tile = group * GROUP_ROWS + place_in_group % group_size
        column = (place_in_group // group_size) * tile_columns
        first_row = tl.sum(tl.where(is_before, count, 0))
        row = first_row + row_tile * BLOCK_ROWS
        row_ids = row + tl.arange(0, BLOCK_ROWS)
        stop_row = first_row + tl.sum(tl.where(is_mine, count, 0))
        weight_row = expert * out_features + column
        left_scales = (expert * scale_rows + column // BLOCK_K) * num_blocks
        right_scale_row = tl.minimum((column + right_offset) // BLOCK_K, scale_rows - 1)
        right_scales = (expert * scale_rows + right_scale_row) * num_blocks
        row_scales = tl.minimum(row_ids, num_rows - 1) * x_scale_row_stride

        # What lies behind a tensor's end reads as 0; what is another expert's is computed and not stored.
        if IS_SWAPPED:
            left = tl.zeros((BLOCK_N, BLOCK_ROWS), dtype=tl.float32)
        else:
            left = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
        right = left
        first_block = split * split_blocks
        stop_block = tl.minimum(first_block + split_blocks, num_blocks)
        for block in tl.range(first_block, stop_block, loop_unroll_factor=NUM_UNROLLED):
            row_scale = tl.load(x_scale + block * x_scale_group_stride + row_scales)
            left_scale = tl.load(weight_scale_inv + left_scales + block)
            rows = x_tiles.load([row, block * BLOCK_K])
            weights = weight_tiles.load([weight_row, block * BLOCK_K])
            if IS_HALVED:
                right_scale = tl.load(weight_scale_inv + right_scales + block)
                right_weights = weight_tiles.load([weight_row + right_offset, block * BLOCK_K])
            left += _multiply(rows, weights, row_scale * left_scale, IS_SWAPPED)
            if IS_HALVED:
                right += _multiply(rows, right_weights, row_scale * right_scale, IS_SWAPPED)

        if IS_SWAPPED:
            left = tl.trans(left)
            right = tl.trans(right)
        if IS_GATED:
            gate = left.to(HIDDEN_DTYPE).to(tl.float32)
            up = right.to(HIDDEN_DTYPE).to(tl.float32)
            left = (gate * tl.sigmoid(gate) * up).to(HIDDEN_DTYPE).to(tl.float32)
        is_row = row_ids < stop_row
        columns = column + tl.arange(0, BLOCK_N)
        places = out + (split * num_rows + row_ids[:, None]).to(tl.int64) * num_columns + columns[None, :]
        is_place = is_row[:, None] & (columns < num_columns)[None, :]
        if IS_QUANTIZED:
            left, scale = quantize_last_dim(left, HAS_UE8M0_SCALES)
            scale_places = out_scale + (column // BLOCK_K).to(tl.int64) * num_rows + row_ids[:, None]
            tl.store(scale_places, scale, mask=is_row[:, None])
        if IS_HALVED and not IS_GATED:  # before the left, or the wide tile's totals do not fit into registers
            is_right = is_row[:, None] & (columns + BLOCK_N < num_columns)[None, :]
            tl.store(places + BLOCK_N, right.to(out.dtype.element_ty), mask=is_right)
        tl.store(places, left.to(out.dtype.element_ty), mask=is_place)


@triton.jit
def _multiply(rows, weights, scale, IS_SWAPPED: tl.constexpr):  # noqa: N803
    """128 products of each, summed by the tensor cores, times ``scale: [BLOCK_ROWS]``."""
    return tl.dot(weights, rows.T) * scale[None, :] if IS_SWAPPED else tl.dot(rows, weights.T) * scale[:, None]


@triton.jit(do_not_specialize=["num_splits"])
def _sum_splits_kernel(parts, out, size, num_splits, BLOCK: tl.constexpr):  # noqa: N803
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_place = places < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.range(0, num_splits):
        total += tl.load(parts + places, mask=is_place, other=0.0)
        parts += size
    tl.store(out + places, total.to(out.dtype.element_ty), mask=is_place)
