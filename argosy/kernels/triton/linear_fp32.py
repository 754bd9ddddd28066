"""Linears with float32 results on the bfloat16 tensor instruction: the head, the router, the index weights.

A float32 weight is split on the way into three bfloat16 parts, whose sum it is exactly: three products replace one of
a sixteenth of their speed. Weights take the instruction's long side, but not with few tokens, for which they are split
before the tokens are there. Few tokens leave few tiles, so K is split over programs, and what each made is added in the
order of K by a second kernel, ``sum_parts``. Invariant: a token's result depends on the token, the weight and its
tile's ``split_k`` alone: all tokens of an entry below get the same order of sums.

Shape letters: T tokens, n in_features, m out_features, S parts of K.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from argosy.kernels.triton.dependent_launch import IS_ON, LINE_BYTES, fetch_lines, let_next_start, wait_for_inputs

ALIGNMENT_BYTES = 16  # of addresses and rows, which the card's tile loads ask for
UPPER_HALF: tl.constexpr = tl.constexpr(-65536)  # of 32 bits


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's piece of the output, and how it walks its part of K."""

    block_out: int
    block_tokens: int
    block_k: int
    split_k: int | None  # None: all of K
    num_stages: int
    num_warps: int


# By the number of tokens, the first entry that is not below them. Up to 128 tokens, whose tiles take their part of K in
# one step, split_k is the same, so a decode batch's size changes no token's sums; the router of 64 and 128 tokens takes
# 6.6 and 7.0 us on an H200 so, in four steps 8.5 and 10.0, the index weights with their sum 8.6 and 9.3, before 10.4
# and 12.4. The others are not measured: from the bytes that the card's memory and second-level cache move. Above 8192
# tokens there are tiles enough, and no parts to keep.
FEW_TOKENS_TILES = (
    (64, Tile(64, 64, 256, 256, 1, 4)),
    (128, Tile(64, 128, 256, 256, 1, 8)),
)
ROUTER_TILES = (
    *FEW_TOKENS_TILES,
    (1024, Tile(128, 128, 64, 896, 4, 8)),
    (8192, Tile(128, 128, 64, 3584, 4, 8)),
    (math.inf, Tile(128, 128, 64, None, 4, 8)),
)
NARROW_FEATURES = 64  # index weights have no more
NARROW_TILES = (
    *FEW_TOKENS_TILES,
    (1024, Tile(64, 128, 64, 448, 4, 4)),
    (8192, Tile(64, 128, 64, 1792, 4, 4)),
    (math.inf, Tile(64, 128, 64, None, 4, 4)),
)
# Weights in bfloat16 are a head's, and tall: whatever is being multiplied, enough is on its way.
HEAD_TILES = (
    (16, Tile(64, 16, 128, None, 5, 4)),
    (32, Tile(128, 32, 64, None, 5, 4)),
    (64, Tile(256, 64, 64, None, 5, 8)),
    (math.inf, Tile(256, 128, 64, None, 4, 8)),
)


def has_aligned_rows(x: torch.Tensor) -> bool:
    """Whether tiles of ``x: [rows, columns]`` can be loaded."""
    row_bytes = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and row_bytes % ALIGNMENT_BYTES == 0 and x.data_ptr() % ALIGNMENT_BYTES == 0


def choose_tile(num_tokens: int, out_features: int, weight_dtype: torch.dtype) -> Tile:
    tiles = NARROW_TILES if out_features <= NARROW_FEATURES else ROUTER_TILES
    if weight_dtype == torch.bfloat16:
        tiles = HEAD_TILES
    return next(tile for limit, tile in tiles if num_tokens <= limit)


def multiply_parts(x: torch.Tensor, weight: torch.Tensor, tile: Tile | None = None) -> torch.Tensor:
    """``x: [T, n]`` bf16, ``weight: [m, n]`` f32 or bf16 -> [S, T, m] float32, to be added over S in its order.

    T and m are not 0; rows of both as ``has_aligned_rows`` asks.
    """
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    tile = tile or choose_tile(num_tokens, out_features, weight.dtype)
    if weight.dtype == torch.float32 and tile.block_k == tile.split_k:
        return _multiply_few(x, weight, tile)
    split_k = tile.split_k or in_features
    num_parts = triton.cdiv(in_features, split_k)
    parts = torch.empty(num_parts, num_tokens, out_features, dtype=torch.float32, device=x.device)
    x_tiles = TensorDescriptor(x, [num_tokens, in_features], [x.stride(0), 1], [tile.block_tokens, tile.block_k])
    weight_shape, weight_strides = [out_features, in_features], [weight.stride(0), 1]
    weight_tiles = TensorDescriptor(weight, weight_shape, weight_strides, [tile.block_out, tile.block_k])
    num_tiles = triton.cdiv(out_features, tile.block_out) * triton.cdiv(num_tokens, tile.block_tokens)
    _linear_kernel[(num_tiles, num_parts)](
        x_tiles,
        weight_tiles,
        weight,
        parts,
        num_tokens,
        out_features,
        in_features,
        split_k,
        weight.stride(0),
        FETCHED_LINES=_count_fetched_lines(tile, split_k, weight.element_size()),
        BLOCK_OUT=tile.block_out,
        BLOCK_TOKENS=tile.block_tokens,
        BLOCK_K=tile.block_k,
        IS_SPLIT=weight.dtype == torch.float32,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=IS_ON,
    )
    return parts


def _multiply_few(x: torch.Tensor, weight: torch.Tensor, tile: Tile) -> torch.Tensor:
    """``multiply_parts`` for a tile that takes its part of K in one step, by a float32 ``weight``."""
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    num_parts = triton.cdiv(in_features, tile.block_k)
    parts = torch.empty(num_parts, num_tokens, out_features, dtype=torch.float32, device=x.device)
    num_tiles = triton.cdiv(out_features, tile.block_out) * triton.cdiv(num_tokens, tile.block_tokens)
    _few_tokens_kernel[(num_tiles, num_parts)](
        x,
        weight,
        parts,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        BLOCK_OUT=tile.block_out,
        BLOCK_TOKENS=tile.block_tokens,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=IS_ON,
    )
    return parts


def _count_fetched_lines(tile: Tile, split_k: int, element_size: int) -> int:
    """Of each row of a program's weights: what its pipeline holds, a power of two."""
    numbers = min(split_k, (tile.num_stages - 1) * tile.block_k)
    return 1 << max(0, (numbers * element_size // LINE_BYTES.value).bit_length() - 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_tiles,
    weight_tiles,
    weight,
    parts,
    num_tokens,
    out_features,
    in_features,
    split_k,
    weight_stride,
    FETCHED_LINES: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK_OUT: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    IS_SPLIT: tl.constexpr,  # noqa: N803
):
    let_next_start()
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    feature = (tl.program_id(0) % out_tiles) * BLOCK_OUT
    token = (tl.program_id(0) // out_tiles) * BLOCK_TOKENS
    part = tl.program_id(1)
    first_k = part * split_k
    stop_k = tl.minimum(first_k + split_k, in_features)
    # Weights depend on no kernel: they are on their way while the tokens are still being made.
    line: tl.constexpr = LINE_BYTES // (weight.dtype.element_ty.primitive_bitwidth // 8)
    fetched_rows = tl.minimum(feature + tl.arange(0, BLOCK_OUT), out_features - 1).to(tl.int64)
    fetched_k = tl.minimum(first_k + tl.arange(0, FETCHED_LINES) * line, stop_k - 1)
    fetch_lines(weight + fetched_rows[:, None] * weight_stride + fetched_k[None, :])
    wait_for_inputs()
    total = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    for k in tl.range(first_k, stop_k, BLOCK_K):  # what lies behind a tensor's end reads as 0
        tokens = x_tiles.load([token, k]).T
        weights = weight_tiles.load([feature, k])
        if IS_SPLIT:
            high, middle, low = _split_in_three(weights, tokens.dtype)
            # From zero, then into the total: ptxas lets products of a chain through a loop not overlap.
            product = tl.zeros_like(total)
            product = tl.dot(low, tokens, product, input_precision="ieee")
            product = tl.dot(middle, tokens, product, input_precision="ieee")
            product = tl.dot(high, tokens, product, input_precision="ieee")
            total += product
        else:
            total = tl.dot(weights, tokens, total, input_precision="ieee")
    features = feature + tl.arange(0, BLOCK_OUT)
    rows = token + tl.arange(0, BLOCK_TOKENS)
    places = (part.to(tl.int64) * num_tokens + rows[:, None]) * out_features + features[None, :]
    is_inside = (rows[:, None] < num_tokens) & (features[None, :] < out_features)
    tl.store(parts + places, tl.trans(total), mask=is_inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _few_tokens_kernel(
    x,
    weight,
    parts,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    BLOCK_OUT: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
):
    """A part of K in one step: its weights are split and in shared memory before the tokens are there."""
    let_next_start()
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    features = (tl.program_id(0) % out_tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = (tl.program_id(0) // out_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    part = tl.program_id(1)
    columns = part * BLOCK_K + tl.arange(0, BLOCK_K)
    is_column = columns < in_features
    is_weight = (features < out_features)[:, None] & is_column[None, :]
    places = features[:, None].to(tl.int64) * weight_stride + columns[None, :]
    high, middle, low = _split_in_three(tl.load(weight + places, mask=is_weight, other=0.0), x.dtype.element_ty)
    wait_for_inputs()
    is_row = rows < num_tokens
    sources = x + rows[:, None].to(tl.int64) * x_stride + columns[None, :]
    tokens = tl.load(sources, mask=is_row[:, None] & is_column[None, :], other=0.0)
    total = tl.dot(tokens, low.T, input_precision="ieee")
    total = tl.dot(tokens, middle.T, total, input_precision="ieee")
    total = tl.dot(tokens, high.T, total, input_precision="ieee")
    targets = parts + (part.to(tl.int64) * num_tokens + rows[:, None]) * out_features + features[None, :]
    tl.store(targets, total, mask=is_row[:, None] & (features < out_features)[None, :])


@triton.jit
def _split_in_three(values, dtype: tl.constexpr):
    """float32 -> three bfloat16 whose sum it is, as ``dtype``: its first eight bits, the next, and the last."""
    # NOTE(numerics): 24 bits are three times 8, so nothing of the weight is lost. Cut, not rounded: a conversion takes
    # the card several times as long as a mask.
    high = (values.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
    rest = values - high
    middle = (rest.to(tl.int32, bitcast=True) & UPPER_HALF).to(tl.float32, bitcast=True)
    return (
        _take_upper_half(high).to(dtype),
        _take_upper_half(middle).to(dtype),
        _take_upper_half(rest - middle).to(dtype),
    )


@triton.jit
def _take_upper_half(values):
    """float32 whose lower 16 bits are 0 -> bfloat16."""
    return (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
