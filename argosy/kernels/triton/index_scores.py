"""The indexer's scores straight from the paged cache: products, ReLU, weights and the sum over heads in one kernel.

Keys take the tensor instruction's long side and the heads of one token its other one, so that the sum over heads stays
within four threads. Few tokens: programs share all tiles of visible keys evenly, and a program keeps a token's query.
Many tokens: a program keeps a tile of keys, and queries stream past it. On Hopper cards the one is done by
``index_scores_few_hopper.py``, the other by ``index_scores_hopper.py``.
Invariant: what the host does not know, how many keys are visible, decides how much is done.

Shape letters: B requests, T tokens of each, J index heads, I index_head_dim, S keys of one sequence.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as HopperDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from argosy.kernels.reference_cache_rows import NumberFormat
from argosy.kernels.triton import index_scores_hopper
from argosy.kernels.triton.card import capability, count_multiprocessors
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs
from argosy.kernels.triton.index_queries import quantize_queries
from argosy.kernels.triton.index_scores_few_hopper import FEW_KEYS, WHOLE_BYTES, launch_few_on_hopper
from argosy.kernels.triton.index_scores_hopper import score_tokens_on_hopper

INTERPRETED_PROGRAMS = 4  # few enough that each does several tiles
FEW_TOKENS = 8  # of a request; up to here keys are read once for each
MAX_FEW_ROWS = 1024  # tokens of all requests whose tiles one program can count
ROW_MULTIPLE = 16  # rows of scores start at multiples of 64 bytes, for whoever reads them


@dataclass(frozen=True, slots=True)
class Tile:
    """Keys and tokens of one program's turn. ``programs``: of one multiprocessor, where they share tiles."""

    block_keys: int
    block_tokens: int
    num_stages: int
    num_warps: int
    programs: int = 0
    is_hopper: bool = False  # the loop that is written out by hand
    turn_tokens: int = 8  # of that loop's turn
    is_whole: bool = True  # of that loop for few tokens: encoded rows of 132 bytes are copied with their scales


# By the bytes of a number: for few tokens, then for many. Not measured yet: what fits without spilling, thrice and
# twice on a multiprocessor.
FEW_TILES = {
    1: Tile(128, 1, 3, 4, 3),
    2: Tile(128, 1, 2, 4, 2),
    4: Tile(32, 1, 1, 8, 2),
}
MANY_TILES = {
    1: Tile(256, 32, 3, 8),
    2: Tile(256, 32, 2, 8),
    4: Tile(32, 16, 1, 8),
}
# What differs from step to step: it would only compile the kernels anew.
STEP_ARGUMENTS = ["block_table", "num_visible", "num_rows", "num_tokens", "max_seq_len", "table_stride"]
# In place of these on Hopper cards: buffers for queries, and the warps of the first of two groups. On an H200, 4,096
# tokens to 65,536 keys: 934 and 631 TOP/s; 64 or 256 tokens, turns of 4 and deeper rings are within 4 % of that.
HOPPER = 90  # what the driver calls it
HOPPER_TILES = {
    1: Tile(256, 128, 8, 4, is_hopper=True),
    2: Tile(256, 128, 6, 4, is_hopper=True),
}
# In place of those for few tokens there. 64 and 128 requests of 4,100 keys on an H200: in bfloat16 21.4 and 38.2 us,
# 23.4 and 41.7 by Triton's loop, 22.4 and 39.4 with five buffers and two programs; in FP8 64 requests 13.5 us, by
# Triton's loop 19.5.
FEW_HOPPER_TILES = {
    1: Tile(64, 1, 5, 4, 4, is_hopper=True),
    2: Tile(64, 1, 3, 4, 3, is_hopper=True),
}
HOPPER_MAX_HEADS = 64  # products of two tokens and a tile's keys stay in registers
HOPPER_KEY_BYTES = (128, 256)  # whole rows of shared memory, as it is swizzled; in registers too
MIN_ROWS = 16  # fewer would only compile the kernel anew


def index_scores_paged(
    index_q: torch.Tensor,
    index_k_cache: torch.Tensor,
    index_weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    max_seq_len: int,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``reference.index_scores`` of keys in a cache.

    ``index_q: [B, T, J, I]``, ``index_k_cache: [num_blocks, block_size, I]`` of its dtype, ``index_weights: [B, T, J]``
    f32, ``block_table: [B, >= blocks]`` int32, ``num_visible: [B, T]`` int32. Returns [B, T, max_seq_len] f32, rows
    padded; what lies at and behind ``num_visible`` is unspecified. J and I are powers of two, the cache is contiguous.
    No host sync.
    """
    return _score(index_q, index_k_cache, None, index_weights, block_table, num_visible, max_seq_len, tile)


def index_scores_paged_encoded(
    index_q: torch.Tensor,
    index_k_cache: torch.Tensor,
    index_weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    max_seq_len: int,
    hadamard: torch.Tensor,
    numbers: NumberFormat,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``reference_cache_rows.index_scores_encoded`` of key rows in a cache: ``index_k_cache: [num_blocks, block_size,
    I + 4]`` uint8. ``hadamard: [I, I]`` f32: all its numbers have one magnitude. Else as ``index_scores_paged``.
    """
    query, weights = quantize_queries(index_q, index_weights, hadamard, numbers)
    keys, scales = index_k_cache.view(numbers.dtype), index_k_cache.view(torch.float32)
    return _score(query, keys, scales, weights, block_table, num_visible, max_seq_len, tile)


def choose_tile(query: torch.Tensor, block_size: int, *, is_few: bool) -> Tile:
    """``query: [B, T, J, I]``, in the numbers that are multiplied."""
    heads, dim = query.shape[2:]
    number_bytes = query.element_size()
    has_room = heads <= HOPPER_MAX_HEADS and dim * number_bytes in HOPPER_KEY_BYTES
    is_hopper = number_bytes in HOPPER_TILES and has_room and query.is_cuda and capability() == HOPPER
    if is_few:
        return (FEW_HOPPER_TILES if is_hopper and block_size % FEW_KEYS == 0 else FEW_TILES)[number_bytes]
    return (HOPPER_TILES if is_hopper else MANY_TILES)[number_bytes]


def takes(index_q: torch.Tensor) -> bool:
    """Whether ``index_q: [B, T, J, I]`` has sizes that tensor instructions multiply."""
    return all(size >= 16 and not size & (size - 1) for size in index_q.shape[2:])


def _score(
    query: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor | None,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    max_seq_len: int,
    tile: Tile | None,
) -> torch.Tensor:
    batch, num_tokens, heads, dim = query.shape
    num_rows = batch * num_tokens
    is_few = num_tokens <= FEW_TOKENS and num_rows <= MAX_FEW_ROWS
    tile = tile or choose_tile(query, keys.shape[1], is_few=is_few)
    row_multiple = ROW_MULTIPLE if is_few or not tile.is_hopper else tile.block_keys
    padded = triton.cdiv(max_seq_len, row_multiple) * row_multiple
    out = torch.empty(batch, num_tokens, padded, dtype=torch.float32, device=query.device)
    scores = out[:, :, :max_seq_len]
    if scores.numel() == 0:
        return scores
    assert takes(query), query.shape
    assert keys.numel() < 2**31, f"{keys.shape}: places of numbers in the cache are counted in 32 bits"
    inputs = (keys, keys if scales is None else scales, weights.contiguous(), block_table, num_visible.contiguous())
    lengths = (num_rows, num_tokens, max_seq_len, block_table.stride(0), padded)
    constants = {
        "BLOCK_SIZE": keys.shape[1],
        "KEY_STRIDE": keys.shape[2],
        "HAS_SCALES": scales is not None,
        "HEADS": heads,
        "DIM": dim,
        "BLOCK_KEYS": tile.block_keys,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "launch_pdl": IS_ON,
    }
    query = query.contiguous()
    num_programs = INTERPRETED_PROGRAMS
    if query.is_cuda:
        num_programs = tile.programs * count_multiprocessors(query.device.index)
    if is_few and tile.is_hopper:
        assert tile.programs > 0 and tile.block_keys == FEW_KEYS, tile
        launch_few_on_hopper(
            query,
            *inputs,
            out,
            max_seq_len,
            has_scales=scales is not None,
            num_programs=num_programs,
            num_stages=tile.num_stages,
            is_whole=tile.is_whole and keys.shape[2] * keys.element_size() == WHOLE_BYTES,
        )
    elif is_few:
        _score_keys_kernel[(num_programs,)](
            query, *inputs, out, *lengths, NUM_ROWS=max(MIN_ROWS, triton.next_power_of_2(num_rows)), **constants
        )
    elif tile.is_hopper:
        _launch_on_hopper(query, *inputs, out, max_seq_len, scales is not None, tile)
    else:
        block_tokens = tile.block_tokens
        queries = TensorDescriptor(query, [num_rows * heads, dim], [dim, 1], [heads, dim])
        grid = (triton.cdiv(max_seq_len, tile.block_keys), triton.cdiv(num_tokens, block_tokens), batch)
        _score_tokens_kernel[grid](queries, *inputs, out, *lengths, BLOCK_TOKENS=block_tokens, **constants)
    return scores


def _launch_on_hopper(
    query: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    block_table: torch.Tensor,
    num_visible: torch.Tensor,
    out: torch.Tensor,
    max_seq_len: int,
    has_scales: bool,
    tile: Tile,
) -> None:
    assert tile.block_keys == index_scores_hopper.BLOCK_KEYS.value and out.shape[2] % tile.block_keys == 0
    batch, num_tokens, heads, dim = query.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * query.element_size(), rank=2)
    weight_layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    grid = (triton.cdiv(max_seq_len, tile.block_keys) * triton.cdiv(num_tokens, tile.block_tokens) * batch,)
    score_tokens_on_hopper[grid](
        HopperDescriptor.from_tensor(query.view(-1, dim), [heads, dim], layout),
        keys,
        scales,
        HopperDescriptor.from_tensor(weights.view(-1), [heads], weight_layout),
        block_table,
        num_visible,
        out,
        num_tokens,
        max_seq_len,
        block_table.stride(0),
        out.stride(1),
        BLOCK_SIZE=keys.shape[1],
        KEY_STRIDE=keys.shape[2],
        NUMBER_BYTES=query.element_size(),
        HAS_SCALES=has_scales,
        BLOCK_TOKENS=tile.block_tokens,
        NUM_STAGES=tile.num_stages,
        TURN_TOKENS=tile.turn_tokens,
        num_warps=tile.num_warps,
    )


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _score_keys_kernel(
    query,
    keys,
    scales,
    weights,
    block_table,
    num_visible,
    out,
    num_rows,
    num_tokens,
    max_seq_len,
    table_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    KEY_STRIDE: tl.constexpr,  # noqa: N803
    HAS_SCALES: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    NUM_ROWS: tl.constexpr,  # noqa: N803
):
    """All rows' tiles in a line, of which a program takes one stretch."""
    let_next_start()
    wait_for_inputs()
    rows = tl.arange(0, NUM_ROWS)
    visible = tl.load(num_visible + rows, mask=rows < num_rows, other=0)
    visible = tl.maximum(tl.minimum(visible, max_seq_len), 0)
    row_tiles = (visible + BLOCK_KEYS - 1) // BLOCK_KEYS
    behind = tl.cumsum(row_tiles)
    total = tl.sum(row_tiles)
    start = (total.to(tl.int64) * tl.program_id(0) // tl.num_programs(0)).to(tl.int32)
    stop = (total.to(tl.int64) * (tl.program_id(0) + 1) // tl.num_programs(0)).to(tl.int32)
    if start == stop:
        return
    first_row = tl.sum((behind <= start).to(tl.int32)).to(tl.int64)
    last_row = tl.sum((behind < stop).to(tl.int32)).to(tl.int64)
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIM)
    for row in tl.range(first_row, last_row + 1):
        row_behind = tl.sum(tl.where(rows == row, behind, 0))
        row_start = row_behind - tl.sum(tl.where(rows == row, row_tiles, 0))
        num_keys = tl.sum(tl.where(rows == row, visible, 0))
        table = block_table + row // num_tokens * table_stride
        row_query = tl.load(query + (row * HEADS + heads[:, None]) * DIM + dims[None, :])
        row_weights = tl.load(weights + row * HEADS + heads)
        place = out + row * out_stride
        for tile in tl.range(tl.maximum(start, row_start) - row_start, tl.minimum(stop, row_behind) - row_start):
            positions = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            is_key = positions < num_keys
            slots = _find_slots(table, positions, is_key, BLOCK_SIZE)
            tile_keys = tl.load(keys + slots[:, None] * KEY_STRIDE + dims[None, :])
            score = _sum_heads(tile_keys, row_query, row_weights)
            if HAS_SCALES:
                score *= tl.load(scales + slots * (KEY_STRIDE // 4) + DIM // 4)
            tl.store(place + positions, score, mask=is_key)


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _score_tokens_kernel(
    queries,
    keys,
    scales,
    weights,
    block_table,
    num_visible,
    out,
    num_rows,
    num_tokens,
    max_seq_len,
    table_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    KEY_STRIDE: tl.constexpr,  # noqa: N803
    HAS_SCALES: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
):
    """A tile of keys against those tokens of a tile that see its first key, and any between them."""
    let_next_start()
    wait_for_inputs()
    first_key = tl.program_id(0) * BLOCK_KEYS
    request = tl.program_id(2)
    tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first = request * num_tokens
    visible = tl.load(num_visible + first + tokens, mask=tokens < num_tokens, other=0)
    sees = visible > first_key
    start = tl.min(tl.where(sees, tokens, num_tokens))
    stop = tl.max(tl.where(sees, tokens + 1, 0))
    if start >= stop:
        return
    num_keys = tl.minimum(tl.max(visible), max_seq_len)
    positions = first_key + tl.arange(0, BLOCK_KEYS)
    dims = tl.arange(0, DIM)
    heads = tl.arange(0, HEADS)
    is_key = positions < num_keys
    table = block_table + request.to(tl.int64) * table_stride
    slots = _find_slots(table, positions, is_key, BLOCK_SIZE)
    tile_keys = tl.load(keys + slots[:, None] * KEY_STRIDE + dims[None, :])
    if HAS_SCALES:
        scale = tl.load(scales + slots * (KEY_STRIDE // 4) + DIM // 4)
    place = out + (first + start).to(tl.int64) * out_stride + positions
    for row in tl.range(first + start, first + stop):
        row_query = queries.load([row * HEADS, 0])
        row_weights = tl.load(weights + row * HEADS + heads)
        score = _sum_heads(tile_keys, row_query, row_weights)
        if HAS_SCALES:
            score *= scale
        tl.store(place, score, mask=is_key)
        place += out_stride


@triton.jit
def _find_slots(table, positions, is_key, BLOCK_SIZE: tl.constexpr):  # noqa: N803
    """Whole tiles of slots: those behind the last key are the null block's, whose scores nobody gets."""
    places = positions.to(tl.uint32)  # division costs less without a sign
    blocks = tl.load(table + places // BLOCK_SIZE, mask=is_key, other=0)
    # NOTE(alignment): with %, Triton 3.6 takes every slot for a multiple of the block size, and reads 16 bytes at once
    # where rows of 132 allow 4.
    return blocks * BLOCK_SIZE + (places & (BLOCK_SIZE - 1)).to(tl.int32)


@triton.jit
def _sum_heads(keys, row_query, row_weights):
    """``keys: [keys, I]``, ``row_query: [J, I]``, ``row_weights: [J]`` -> [keys] f32."""
    if keys.dtype == tl.int8:
        products = tl.dot(keys, row_query.T, out_dtype=tl.int32).to(tl.float32)
    else:
        products = tl.dot(keys, row_query.T, input_precision="ieee")
    # x + |x| is 2 relu(x), exactly; a maximum would take the pipe that also converts and compares, at half the speed.
    return tl.sum((products + tl.abs(products)) * (row_weights * 0.5)[None, :], axis=1)
