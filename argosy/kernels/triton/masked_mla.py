"""Attention of one sequence with materialised heads, in which each token has its own choice of keys.

It is what a prefill of moderate length wants: all keys are multiplied, but those of a head are 192 numbers and its
values 128, where the sparse core multiplies 576 and 512 of each chosen row. A program takes a block of queries of one
head and goes through the blocks of keys up to the last query's own position. The softmax is computed along the way, in
float32. A key's part that all heads share is never copied to them: scores are sums of two products.
Invariant: a token's result depends on its own query and chosen keys; a token without any gets zeros.

Shape letters: T tokens, S keys, H heads, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from argosy.kernels import reference
from argosy.kernels.triton import masked_mla_hopper
from argosy.kernels.triton.card import capability
from argosy.kernels.triton.masked_mla_hopper import attend_masked_on_hopper

HOPPER = 90  # what the driver calls it
HOPPER_WARPS = 4  # of the first of two groups; the kernel adds the other's and one that copies
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # below every score, and finite: two of them can be subtracted
# Keys and values of the heads that are worked on at a time: a third of the card's cache. Not measured yet.
MAX_TOGETHER_BYTES = 16 * 2**20
VECTOR_WORDS, VECTOR_BYTES = 4, 16
# Up to how many keys it is used: 64 KiB of keys and values each with 128 heads, so 1 GiB of them.
MAX_KEYS = 16384
# Operations a second, for the choice between this and the sparse core: of this kernel and of the product that makes
# keys and values (both predicted, not measured yet), of the sparse core and of the two products that move queries into
# latent space and results out of it (both measured on one H200, 2026-11-22).
MASKED_OPS_S, EXPAND_OPS_S = 480e12, 650e12
SPARSE_OPS_S, ABSORB_OPS_S = 402e12, 374e12
PADDED_QUERIES = 128  # a block is computed as a whole


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries of a program, and keys at a time, of the loop that Triton pipelines."""

    block_queries: int
    block_keys: int
    num_stages: int
    num_warps: int


# Where the loop for Hopper does not fit: other cards, float32, heads of other sizes. Not measured yet.
PORTABLE_TILE = Tile(128, 64, 2, 8)
FLOAT32_TILE = Tile(32, 16, 1, 8)


@dataclass(frozen=True, slots=True)
class Dims:
    """Of a head; the latent's."""

    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


def is_faster_than_sparse(num_tokens: int, num_computed: int, num_selected: int, dims: Dims) -> bool:
    """Whether ``num_tokens`` new tokens attend faster here, all operations counted, than each to its own
    ``num_selected`` cache rows.

    Here the work grows with all keys that a token sees, and every step expands all earlier latents again. With
    DeepSeek's sizes and 2,048 rows it pays while a token sees up to about 8,000 keys on average: for whole prompts to
    about 15,000 tokens; for 4,096 tokens behind up to 5,900 earlier ones, for 8,192 behind 4,100, for 256 behind 3,700.
    """
    num_keys = num_computed + num_tokens
    if num_keys > MAX_KEYS:
        return False
    num_queries = -(-num_tokens // PADDED_QUERIES) * PADDED_QUERIES
    num_pairs = num_queries * (num_computed + (num_queries + PADDED_QUERIES) / 2)
    expand_ops = dims.kv_lora_rank * (dims.nope_dim + dims.v_dim)
    masked_s = num_pairs * (dims.nope_dim + dims.rope_dim + dims.v_dim) / MASKED_OPS_S
    masked_s += num_keys * expand_ops / EXPAND_OPS_S
    num_short = min(max(num_selected - num_computed, 0), num_tokens)  # tokens that see fewer
    num_rows = num_short * (num_computed + (num_short + 1) / 2) + (num_tokens - num_short) * num_selected
    sparse_s = num_rows * (2 * dims.kv_lora_rank + dims.rope_dim) / SPARSE_OPS_S
    sparse_s += num_tokens * expand_ops / ABSORB_OPS_S
    return masked_s < sparse_s


def attend_expanded_masked(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    num_computed: int,
    softmax_scale: float,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``q_nope: [T, H, N]``, ``q_rope: [T, H, P]`` at positions num_computed .. num_computed + T - 1, ``k_nope: [S, H,
    N]``, ``k_rope: [S, P]``, ``value: [S, H, V]`` with S = num_computed + T, ``mask: [T, ceil(S / 32)]`` int32 with
    bits as ``reference.select_topk_mask`` sets them, none behind a token's own position; None: all up to there ->
    [T, H, V].

    All may be strided but in the last dimension. No host sync. ``tile``: the loop that Triton pipelines, with it.
    """
    num_tokens, heads, nope_dim = q_nope.shape
    rope_dim, v_dim = q_rope.shape[2], value.shape[2]
    assert value.shape[0] == num_computed + num_tokens, "the last query's own key must be the last key"
    if not _has_tiles(nope_dim, rope_dim, v_dim):
        return reference.attend_expanded_masked(
            q_nope, q_rope, k_nope, k_rope, value, mask, num_computed, softmax_scale
        )
    out = torch.empty(num_tokens, heads, v_dim, dtype=q_nope.dtype, device=q_nope.device)
    if num_tokens == 0:
        return out
    tensors = (q_nope, q_rope, k_nope, k_rope, value, mask, num_computed, softmax_scale)
    if tile is None and is_for_hopper(q_nope, q_rope, k_nope, k_rope, value):
        launch_on_hopper(*tensors, out)
    else:
        _launch(*tensors, out, tile or (FLOAT32_TILE if q_nope.dtype == torch.float32 else PORTABLE_TILE))
    return out


def is_for_hopper(
    q_nope: torch.Tensor, q_rope: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, value: torch.Tensor
) -> bool:
    """Whether the loop for Hopper takes such tensors: two buffers fit into shared memory, the copy engine's rules."""
    tensors = (q_nope, q_rope, k_nope, k_rope, value)
    sizes = (q_nope.shape[2], q_rope.shape[2], value.shape[2])
    if sizes != (128, 64, 128) or q_nope.element_size() != 2:
        return False
    if not (q_nope.is_cuda and capability() == HOPPER):
        return False
    return all(_is_aligned(tensor) and tensor.stride(-1) == 1 for tensor in tensors)


def launch_on_hopper(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    num_computed: int,
    softmax_scale: float,
    out: torch.Tensor,
) -> None:
    """Only for what ``is_for_hopper``; ``out: [T, H, V]`` is contiguous."""
    num_tokens, heads, nope_dim = q_nope.shape
    num_keys = value.shape[0]
    mask_stride = 0 if mask is None else mask.stride(0)
    group_queries = masked_mla_hopper.GROUP_QUERIES.value
    block_keys = masked_mla_hopper.BLOCK_KEYS.value
    attend_masked_on_hopper[(triton.cdiv(num_tokens, masked_mla_hopper.BLOCK_QUERIES.value) * heads,)](
        _describe(q_nope, group_queries),
        _describe(q_rope, group_queries),
        _describe(k_nope, block_keys),
        _describe(k_rope.unsqueeze(1), block_keys),
        _describe(value, block_keys),
        _describe(out, group_queries),
        out if mask is None else mask,  # a launch needs a pointer
        softmax_scale * math.log2(math.e),
        num_tokens,
        num_keys,
        num_computed,
        mask_stride // VECTOR_WORDS,
        mask_stride,
        _count_heads_together(heads, num_keys * (nope_dim + value.shape[2]) * value.element_size()),
        q_nope.stride(1),
        q_rope.stride(1),
        k_nope.stride(1),
        value.stride(1),
        N=nope_dim,
        P=q_rope.shape[2],
        HAS_MASK=mask is not None,
        HAS_VECTORS=mask is not None and _is_aligned(mask),
        num_warps=HOPPER_WARPS,
    )


def _describe(tensor: torch.Tensor, num_rows: int) -> TensorDescriptor:
    """``tensor: [rows, H, n]`` as [rows, columns of all heads], copied in boxes of a head's."""
    width = (tensor.shape[1] - 1) * tensor.stride(1) + tensor.shape[2]
    flat = tensor.as_strided((tensor.shape[0], width), (tensor.stride(0), 1))
    return TensorDescriptor.from_tensor(flat, [num_rows, tensor.shape[2]], masked_mla_hopper.SHARED.value)


def _count_heads_together(heads: int, head_bytes: int) -> int:
    """A power of two that divides the heads."""
    together = 1
    while heads % (2 * together) == 0 and 2 * together * head_bytes <= MAX_TOGETHER_BYTES:
        together *= 2
    return together


def _is_aligned(tensor: torch.Tensor) -> bool:
    """All rows begin where 16 bytes can be read at once."""
    strides = (stride * tensor.element_size() for stride in tensor.stride()[:-1])
    return tensor.data_ptr() % VECTOR_BYTES == 0 and all(stride % VECTOR_BYTES == 0 for stride in strides)


def _has_tiles(*sizes: int) -> bool:
    """Tiles have sides that are powers of two."""
    return all(size >= 16 and not size & (size - 1) for size in sizes)


def _launch(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    num_computed: int,
    softmax_scale: float,
    out: torch.Tensor,
    tile: Tile,
) -> None:
    num_tokens, heads, nope_dim = q_nope.shape
    tensors = (q_nope, q_rope, k_nope, k_rope, value)
    q_nope, q_rope, k_nope, k_rope, value = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    _attend_kernel[(triton.cdiv(num_tokens, tile.block_queries) * heads,)](
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        value,
        out,
        out if mask is None else mask,
        softmax_scale * math.log2(math.e),
        num_tokens,
        value.shape[0],
        num_computed,
        0 if mask is None else mask.stride(0),
        heads,
        *(stride for tensor in (q_nope, q_rope, k_nope) for stride in tensor.stride()[:2]),
        k_rope.stride(0),
        *value.stride()[:2],
        N=nope_dim,
        P=q_rope.shape[2],
        V=value.shape[2],
        HAS_MASK=mask is not None,
        BLOCK_QUERIES=tile.block_queries,
        BLOCK_KEYS=tile.block_keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit(do_not_specialize=["num_tokens", "num_keys", "num_computed", "mask_stride"])
def _attend_kernel(
    q_nope,
    q_rope,
    k_nope,
    k_rope,
    value,
    out,
    mask,
    scale,
    num_tokens,
    num_keys,
    num_computed,
    mask_stride,
    heads,
    q_nope_row,
    q_nope_head,
    q_rope_row,
    q_rope_head,
    k_nope_row,
    k_nope_head,
    k_rope_row,
    value_row,
    value_head,
    N: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    P: tl.constexpr,  # noqa: N803
    V: tl.constexpr,  # noqa: N803
    HAS_MASK: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
):
    """Strides are those of rows and of heads, in numbers."""
    num_query_blocks = tl.cdiv(num_tokens, BLOCK_QUERIES)
    head = (tl.program_id(0) // num_query_blocks).to(tl.int64)
    first_query = (num_query_blocks - 1 - tl.program_id(0) % num_query_blocks) * BLOCK_QUERIES
    rows = (first_query + tl.arange(0, BLOCK_QUERIES)).to(tl.int64)
    is_row = rows[:, None] < num_tokens
    nopes, ropes, columns = tl.arange(0, N), tl.arange(0, P), tl.arange(0, V)
    q_nopes = tl.load(q_nope + head * q_nope_head + rows[:, None] * q_nope_row + nopes[None, :], mask=is_row, other=0.0)
    q_ropes = tl.load(q_rope + head * q_rope_head + rows[:, None] * q_rope_row + ropes[None, :], mask=is_row, other=0.0)
    highest = tl.full((BLOCK_QUERIES,), LOWEST, tl.float32)
    share_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
    total = tl.zeros((BLOCK_QUERIES, V), tl.float32)
    for first_key in tl.range(0, tl.minimum(num_computed + first_query + BLOCK_QUERIES, num_keys), BLOCK_KEYS):
        keys = (first_key + tl.arange(0, BLOCK_KEYS)).to(tl.int64)
        is_key = keys[:, None] < num_keys
        k_nopes = tl.load(k_nope + head * k_nope_head + keys[:, None] * k_nope_row + nopes[None, :], is_key, 0.0)
        k_ropes = tl.load(k_rope + keys[:, None] * k_rope_row + ropes[None, :], is_key, 0.0)
        values = tl.load(value + head * value_head + keys[:, None] * value_row + columns[None, :], is_key, 0.0)
        scores = tl.dot(q_nopes, k_nopes.T, input_precision="ieee")
        scores = tl.dot(q_ropes, k_ropes.T, scores, input_precision="ieee")
        if HAS_MASK:
            words = mask + rows[:, None] * mask_stride + keys[None, :] // 32
            is_chosen = (tl.load(words, mask=is_row & (keys[None, :] < num_keys), other=0) >> (keys[None, :] % 32)) & 1
            is_chosen = is_chosen != 0
        else:
            is_chosen = keys[None, :] <= rows[:, None] + num_computed
        scores = tl.where(is_chosen, scores * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        shares = tl.exp2(scores - new_highest[:, None])
        share_sum = share_sum * shrink + tl.sum(shares, 1)
        total = tl.dot(shares.to(values.dtype), values, total * shrink[:, None], input_precision="ieee")
        highest = new_highest
    total = total / tl.where(share_sum == 0.0, 1.0, share_sum)[:, None]
    places = out + (rows[:, None] * heads + head) * V + columns[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=is_row)
