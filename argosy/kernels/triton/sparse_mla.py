"""Absorbed attention of every token over its own choice of cache rows, plain or of 8-bit numbers.

A program takes a block of heads of one token, and a share of the token's keys. It gathers the keys' rows into shared
memory once, for both products: scores with all of a row, sums with its first R numbers. The softmax is computed along
the way, in float32. Where tokens are few, each one's keys are split over programs, and a second kernel joins the parts.
On Hopper cards the loops of ``sparse_mla_hopper.py`` and ``sparse_mla_pairs.py`` take this one's place.
Invariant: a token's result depends on its own query, slots and rows; keys that are -1 count for nothing, a token that
has no others gets zeros.

Shape letters: T tokens, H heads, R kv_lora_rank, P qk_rope_head_dim, C = R + P, K keys of a token, S shares of them,
W bytes of an encoded row.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from argosy.kernels import reference, reference_cache_rows
from argosy.kernels.reference_cache_rows import LatentRowLayout
from argosy.kernels.triton.card import capability, count_multiprocessors
from argosy.kernels.triton.dependent_launch import IS_ON
from argosy.kernels.triton.sparse_mla_hopper import attend_on_hopper
from argosy.kernels.triton.sparse_mla_pairs import attend_in_pairs

INTERPRETED_MULTIPROCESSORS = 8
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)  # below every score, and finite: two of them can be subtracted
# What it costs to split a token's keys, in units of the time that one program needs for all of them: the second
# kernel's launch, and each share of a token's passage through memory. Estimated, not measured yet.
JOIN_COST = 0.05
SHARE_COST = 0.0016
MAX_SHARES = 32
MIN_SHARE_SIZE = 2048  # keys that are looked through for known ones: fewer would only compile the kernel anew


@dataclass(frozen=True, slots=True)
class Tile:
    """Heads of a program, and keys that it gathers at a time."""

    block_heads: int
    block_keys: int
    num_stages: int
    num_warps: int
    is_hopper: bool = False  # the kernel whose loop is written out by hand
    is_paired: bool = False  # the other such kernel, where tokens are not split and rows are plain


# By what the rows are, then by the number of heads: the first entry that is not below it. Not measured yet.
HOPPER = 90  # the capability that the written-out loop is made for
HOPPER_MIN_WIDTH = 64  # of latent and rope parts: 128 bytes, which the loop's shared memory is swizzled by
HOPPER_TILE = Tile(64, 64, 1, 8, is_hopper=True)
PAIRED_TILE = Tile(64, 64, 1, 8, is_hopper=True, is_paired=True)
PAIRED_ROPE_DIM, PAIRED_RANKS = 64, range(128, 513)  # weights take the ropes' place; shared memory
PAIRED_WARPS = 4  # of the first of two groups; the kernel adds the other's and those that gather
PLAIN_TILES = ((16, Tile(16, 64, 5, 8)), (math.inf, PAIRED_TILE))  # or HOPPER_TILE, where that turns out faster
ENCODED_TILES = ((16, Tile(16, 64, 3, 8)), (math.inf, HOPPER_TILE))
FLOAT32_TILE = Tile(16, 16, 1, 8)  # twice the bytes, and no tensor instruction
# What takes the place of a hand-written loop where there is none: Triton's interpreter, other shapes, comparisons.
PORTABLE_TILE = Tile(64, 64, 3, 8)
PORTABLE_ENCODED_TILE = Tile(64, 32, 3, 8)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A cache as kernels read it: three views of the same bytes, of which plain rows need but one."""

    numbers: torch.Tensor
    scales: torch.Tensor
    ropes: torch.Tensor
    rank: int
    group_size: int  # numbers that share a scale; 0: plain rows
    width: int  # of a row, in numbers


def attend_sparse(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    topk_slots: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    *,
    is_full: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``query: [T, H, C]``, ``latent_cache: [num_blocks, block_size, C]`` of the same dtype, ``topk_slots: [T, K]``
    int64, -1 none -> [T, H, R].

    ``is_full`` promises that there is no -1. Contiguous but for query's strides of T and H. No host sync.
    """
    if not _has_tiles(kv_lora_rank, query.shape[2] - kv_lora_rank):
        return reference.attend_sparse(query, latent_cache, topk_slots, kv_lora_rank, softmax_scale, is_full=is_full)
    rows = _Rows(latent_cache, latent_cache, latent_cache, kv_lora_rank, 0, latent_cache.shape[-1])
    tile = tile or choose_tile(query, kv_lora_rank, is_encoded=False)
    return _attend(query, rows, topk_slots, softmax_scale, is_full, tile)


def attend_sparse_encoded(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    topk_slots: torch.Tensor,
    layout: LatentRowLayout,
    softmax_scale: float,
    *,
    is_full: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``attend_sparse`` over encoded rows, ``latent_cache: [num_blocks, block_size, W]`` uint8.

    What is decoded has query's dtype, as in the specification.
    """
    is_whole = layout.kv_lora_rank % layout.group_size == 0
    if not is_whole or not _has_tiles(layout.kv_lora_rank, layout.qk_rope_head_dim):
        return reference_cache_rows.attend_sparse_encoded(
            query, latent_cache, topk_slots, layout, softmax_scale, is_full=is_full
        )
    rows = _Rows(
        latent_cache.view(layout.numbers.dtype),
        latent_cache.view(torch.float32),
        latent_cache.view(torch.bfloat16),
        layout.kv_lora_rank,
        layout.group_size,
        layout.num_bytes,
    )
    tile = tile or choose_tile(query, layout.kv_lora_rank, is_encoded=True)
    return _attend(query, rows, topk_slots, softmax_scale, is_full, tile)


def choose_tile(query: torch.Tensor, rank: int, *, is_encoded: bool) -> Tile:
    """From the heads, their dtype and widths, and the device."""
    if query.dtype == torch.float32:
        return FLOAT32_TILE
    heads = query.shape[1]
    tile = next(tile for limit, tile in (ENCODED_TILES if is_encoded else PLAIN_TILES) if heads <= limit)
    has_whole_swizzles = min(rank, query.shape[2] - rank) >= HOPPER_MIN_WIDTH
    if tile.is_hopper and not (has_whole_swizzles and query.is_cuda and capability() == HOPPER):
        return PORTABLE_ENCODED_TILE if is_encoded else PORTABLE_TILE
    if tile.is_paired and not (rank in PAIRED_RANKS and query.shape[2] - rank == PAIRED_ROPE_DIM):
        return HOPPER_TILE
    return tile


def choose_num_shares(num_tokens: int, num_head_blocks: int, num_key_blocks: int, num_multiprocessors: int) -> int:
    """Into how many shares each token's keys are split: a power of two, 1 from about a token a multiprocessor."""

    def cost(shares: int) -> float:
        rounds = -(-num_tokens * num_head_blocks * shares // num_multiprocessors)
        return rounds / shares + (JOIN_COST + SHARE_COST * num_tokens * shares if shares > 1 else 0.0)

    powers = (1 << exponent for exponent in range(MAX_SHARES.bit_length()))
    return min((shares for shares in powers if shares <= max(1, num_key_blocks)), key=cost)


def _has_tiles(rank: int, rope_dim: int) -> bool:
    """Tiles have sides that are powers of two."""
    return all(size >= 16 and not size & (size - 1) for size in (rank, rope_dim))


def _attend(
    query: torch.Tensor, rows: _Rows, topk_slots: torch.Tensor, softmax_scale: float, is_full: bool, tile: Tile
) -> torch.Tensor:
    num_tokens, heads, dim = query.shape
    num_keys = topk_slots.shape[1]
    out = torch.empty(num_tokens, heads, rows.rank, dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out
    query = query if query.stride(2) == 1 else query.contiguous()
    num_head_blocks, num_key_blocks = triton.cdiv(heads, tile.block_heads), triton.cdiv(num_keys, tile.block_keys)
    multiprocessors = count_multiprocessors(query.device.index) if query.is_cuda else INTERPRETED_MULTIPROCESSORS
    num_shares = choose_num_shares(num_tokens, num_head_blocks, num_key_blocks, multiprocessors)
    if tile.is_paired and num_shares == 1:
        _launch_in_pairs(query, rows, topk_slots, out, softmax_scale, is_full)
        return out
    share_keys = triton.cdiv(num_key_blocks, num_shares) * tile.block_keys
    parts, part_sums = out, out  # a launch needs a pointer
    if num_shares > 1:
        parts = torch.empty(num_tokens, num_shares, heads, rows.rank, dtype=torch.float32, device=query.device)
        part_sums = torch.empty(num_tokens, num_shares, heads, dtype=torch.float32, device=query.device)
    kernel = attend_on_hopper if tile.is_hopper else _attend_kernel
    kernel[(num_tokens * num_shares * num_head_blocks,)](
        query,
        rows.numbers,
        rows.scales,
        rows.ropes,
        topk_slots,
        parts,
        part_sums,
        softmax_scale * math.log2(math.e),
        heads,
        num_keys,
        topk_slots.stride(0),
        query.stride(0),
        query.stride(1),
        share_keys,
        num_shares,
        R=rows.rank,
        P=dim - rows.rank,
        WIDTH=rows.width,
        GROUP_SIZE=rows.group_size,
        BLOCK_HEADS=tile.block_heads,
        BLOCK_KEYS=tile.block_keys,
        SHARE_SIZE=max(MIN_SHARE_SIZE, triton.next_power_of_2(share_keys)),
        IS_FULL=is_full,
        IS_SHARE=num_shares > 1,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_shares > 1:
        _join_kernel[(num_tokens, heads)](parts, part_sums, out, heads, R=rows.rank, NUM_SHARES=num_shares)
    return out


def _launch_in_pairs(
    query: torch.Tensor,
    rows: _Rows,
    topk_slots: torch.Tensor,
    out: torch.Tensor,
    softmax_scale: float,
    is_full: bool,
) -> None:
    num_tokens, heads, _ = query.shape
    attend_in_pairs[(num_tokens * triton.cdiv(heads, PAIRED_TILE.block_heads),)](
        query,
        rows.numbers,
        topk_slots,
        out,
        softmax_scale * math.log2(math.e),
        heads,
        topk_slots.shape[1],
        topk_slots.stride(0),
        query.stride(0),
        query.stride(1),
        R=rows.rank,
        WIDTH=rows.width,
        NUM_PLACES=max(MIN_SHARE_SIZE, triton.next_power_of_2(topk_slots.shape[1])),
        IS_FULL=is_full,
        num_warps=PAIRED_WARPS,
        launch_pdl=IS_ON,
    )


@triton.jit(do_not_specialize_on_alignment=["num_shares"])
def _attend_kernel(
    query,
    numbers,
    scales,
    ropes,
    slots,
    out,
    log_sums,
    scale,
    heads,
    num_keys,
    slot_stride,
    token_stride,
    head_stride,
    share_keys,
    num_shares,
    R: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    P: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    GROUP_SIZE: tl.constexpr,  # noqa: N803
    BLOCK_HEADS: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    SHARE_SIZE: tl.constexpr,  # noqa: N803
    IS_FULL: tl.constexpr,  # noqa: N803
    IS_SHARE: tl.constexpr,  # noqa: N803
):
    # A token's blocks of heads are neighbours: the second finds the rows in the card's cache.
    num_head_blocks = tl.cdiv(heads, BLOCK_HEADS)
    head_ids = (tl.program_id(0) % num_head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head = head_ids[:, None] < heads
    part = (tl.program_id(0) // num_head_blocks).to(tl.int64)  # of all tokens' shares
    token = part // num_shares
    start = (part % num_shares).to(tl.int32) * share_keys
    stop = tl.minimum(start + share_keys, num_keys)
    token_slots = slots + token * slot_stride
    if not IS_FULL:  # what is behind the last known slot is skipped
        places = start + tl.arange(0, SHARE_SIZE)
        is_known = tl.load(token_slots + places, mask=places < stop, other=-1) >= 0
        stop = tl.max(tl.where(is_known, places + 1, start))

    ranks = tl.arange(0, R)[None, :]
    rope_ids = tl.arange(0, P)[None, :]
    queries = query + token * token_stride + head_ids[:, None] * head_stride
    q_latent = tl.load(queries + ranks, mask=is_head, other=0.0)
    q_rope = tl.load(queries + R + rope_ids, mask=is_head, other=0.0)
    highest = tl.full((BLOCK_HEADS,), LOWEST, tl.float32)
    weight_sum = tl.zeros((BLOCK_HEADS,), tl.float32)
    total = tl.zeros((BLOCK_HEADS, R), tl.float32)
    for first in tl.range(start, stop, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        slot = tl.load(token_slots + keys, mask=keys < stop, other=-1)
        is_key = slot >= 0
        latent, rope = _load_rows(numbers, scales, ropes, slot, query.dtype.element_ty, R, P, WIDTH, GROUP_SIZE)
        scores = tl.dot(q_latent, latent.T, input_precision="ieee")
        scores = tl.dot(q_rope, rope.T, scores, input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        total = tl.dot(weights.to(latent.dtype), latent, total * shrink[:, None], input_precision="ieee")
        highest = new_highest

    is_empty = weight_sum == 0.0
    total = total / tl.where(is_empty, 1.0, weight_sum)[:, None]
    rows = part * heads + head_ids
    tl.store(out + rows[:, None] * R + ranks, total.to(out.dtype.element_ty), mask=is_head)
    if IS_SHARE:
        log_sum = tl.where(is_empty, LOWEST, highest + tl.log2(tl.where(is_empty, 1.0, weight_sum)))
        tl.store(log_sums + rows, log_sum, mask=head_ids < heads)


@triton.jit
def _load_rows(
    numbers,
    scales,
    ropes,
    slot,
    dtype: tl.constexpr,
    R: tl.constexpr,  # noqa: N803
    P: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    GROUP_SIZE: tl.constexpr,  # noqa: N803
):
    is_key = (slot >= 0)[:, None]
    ranks = tl.arange(0, R)[None, :]
    rope_ids = tl.arange(0, P)[None, :]
    if GROUP_SIZE == 0:
        latent = tl.load(numbers + slot[:, None] * WIDTH + ranks, mask=is_key, other=0.0)
        rope = tl.load(ropes + slot[:, None] * WIDTH + (R + rope_ids), mask=is_key, other=0.0)
    else:
        NUM_GROUPS: tl.constexpr = R // GROUP_SIZE  # noqa: N806
        values = tl.load(numbers + slot[:, None] * WIDTH + ranks, mask=is_key, other=0.0).to(tl.float32)
        groups = R // 4 + tl.arange(0, NUM_GROUPS)[None, :]
        scale = tl.load(scales + slot[:, None] * (WIDTH // 4) + groups, mask=is_key, other=0.0)
        values = tl.reshape(values, (slot.shape[0], NUM_GROUPS, GROUP_SIZE)) * scale[:, :, None]
        latent = tl.reshape(values, (slot.shape[0], R)).to(dtype)
        rope_start: tl.constexpr = R // 2 + 2 * NUM_GROUPS
        rope = tl.load(ropes + slot[:, None] * (WIDTH // 2) + (rope_start + rope_ids), mask=is_key, other=0.0)
        rope = rope.to(dtype)
    return latent, rope


@triton.jit
def _join_kernel(
    parts,
    log_sums,
    out,
    heads,
    R: tl.constexpr,  # noqa: N803
    NUM_SHARES: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    ranks = tl.arange(0, R)[None, :]
    places = (token * NUM_SHARES + tl.arange(0, NUM_SHARES)) * heads + head
    log_sum = tl.load(log_sums + places)
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))
    values = tl.load(parts + places[:, None] * R + ranks) * weights[:, None]
    total = tl.sum(values, 0) / tl.sum(weights, 0)
    tl.store(out + (token * heads + head) * R + tl.arange(0, R), total.to(out.dtype.element_ty))
