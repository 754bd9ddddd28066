"""From a projection's raw output to a token's cache row in one launch: norm, rotation, 8-bit numbers, and the write.

In plain torch that is up to fifteen launches, each on a few kilobytes; here one program makes a token's whole row in
registers. It does not change its inputs. Invariant: rounding to the model's dtype happens wherever the torch path keeps
a tensor, so rows are the same but for the last bits of norms and of rotations by a Hadamard matrix.

Shape letters: T tokens, R kv_lora_rank, P qk_rope_head_dim, C = R + P, I index_head_dim, W bytes of a row.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.reference import RotaryRows
from argosy.kernels.reference_cache_rows import GROUP_SIZE, MIN_AMAX, SCALE_BYTES, LatentRowLayout, NumberFormat
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs
from argosy.kernels.triton.norms import layer_normalize, rms_normalize
from argosy.kernels.triton.quantize import find_amax, round_to_int8
from argosy.kernels.triton.rotary import rotate_half, rotate_interleaved

# One warp holds a row, so that no sum or shuffle leaves it. Not measured yet.
NUM_WARPS = 1


def write_latent(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    latent_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """RMSNorm of the first R, interleaved RoPE of the last P, then the write, in place; slot -1 writes nothing.

    ``latent: [T, C]`` as kv_a_proj gave it, rows may be strided; ``norm_weight: [R]`` f32; ``latent_cache: [num_blocks,
    block_size, C]``; ``slot_mapping: [T]`` int64.
    """
    rank = norm_weight.shape[0]
    _launch_write_latent(latent, norm_weight, eps, rotary, latent_cache, slot_mapping, rank)


def write_latent_encoded(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    latent_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentRowLayout,
) -> None:
    """``write_latent`` into rows of 8-bit numbers (``reference_cache_rows.encode_latent``), ``latent_cache:
    [num_blocks, block_size, W]`` uint8. R must be a multiple of 4, so that scales lie as float32 numbers do."""
    assert layout.kv_lora_rank % SCALE_BYTES == 0, layout
    rank = layout.kv_lora_rank
    _launch_write_latent(latent, norm_weight, eps, rotary, latent_cache, slot_mapping, rank, layout.numbers)


def write_index_k(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    rope_dim: int,
    index_k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """LayerNorm, half-split RoPE of the first ``rope_dim``, then the write, in place; slot -1 writes nothing.

    ``key: [T, I]`` as wk gave it, rows may be strided; ``norm_weight, norm_bias: [I]`` f32;
    ``index_k_cache: [num_blocks, block_size, I]``; ``slot_mapping: [T]`` int64.
    """
    _launch_write_index_k(key, norm_weight, norm_bias, eps, rotary, rope_dim, index_k_cache, slot_mapping)


def write_index_k_encoded(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    rope_dim: int,
    index_k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    hadamard: torch.Tensor,
    numbers: NumberFormat,
) -> None:
    """``write_index_k`` into rows of 8-bit numbers (``reference_cache_rows.encode_index_k``), ``index_k_cache:
    [num_blocks, block_size, I + 4]`` uint8.

    ``hadamard: [I, I]`` f32 must be ``hadamard_matrix``'s: of it the factor alone is read, for the fast transform knows
    the signs. I must be a power of two, and 4 at least.
    """
    _launch_write_index_k(
        key, norm_weight, norm_bias, eps, rotary, rope_dim, index_k_cache, slot_mapping, hadamard, numbers
    )


def _launch_write_latent(
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rank: int,
    numbers: NumberFormat | None = None,
) -> None:
    num_tokens, width = latent.shape
    if num_tokens == 0:
        return
    turns = torch.view_as_real(rotary.turns)  # [T, 1, P / 2, 2]
    block = triton.next_power_of_2(rank)
    _write_latent_kernel[(num_tokens,)](
        latent,
        norm_weight,
        turns,
        cache,
        slot_mapping,
        eps,
        latent.stride(0),
        turns.stride(0),
        RANK=rank,
        ROPE_DIM=width - rank,
        ROW_WIDTH=cache.shape[2],
        BLOCK_ROPE=triton.next_power_of_2(width - rank),
        GROUP=min(GROUP_SIZE, block),
        NUM_GROUPS=triton.cdiv(block, GROUP_SIZE),
        IS_ENCODED=numbers is not None,
        IS_FP8=numbers is not None and numbers.dtype.is_floating_point,
        MAX_VALUE=numbers.max_value if numbers is not None else 0.0,
        MIN_AMAX=MIN_AMAX,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )


def _launch_write_index_k(
    key: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    rotary: RotaryRows,
    rope_dim: int,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    hadamard: torch.Tensor | None = None,
    numbers: NumberFormat | None = None,
) -> None:
    num_tokens, width = key.shape
    assert numbers is None or not width & (width - 1), f"the fast transform wants a power of two, not {width}"
    if num_tokens == 0:
        return
    _write_index_k_kernel[(num_tokens,)](
        key,
        norm_weight,
        norm_bias,
        rotary.half_cos,
        rotary.half_sin,
        norm_weight if hadamard is None else hadamard,  # a launch needs a pointer
        cache,
        slot_mapping,
        eps,
        key.stride(0),
        rotary.half_cos.stride(0),
        rotary.half_sin.stride(0),
        WIDTH=width,
        ROPE_DIM=rope_dim,
        ROW_WIDTH=cache.shape[2],
        BLOCK=triton.next_power_of_2(width),
        LOG_WIDTH=width.bit_length() - 1,
        IS_ENCODED=numbers is not None,
        IS_FP8=numbers is not None and numbers.dtype.is_floating_point,
        MAX_VALUE=numbers.max_value if numbers is not None else 0.0,
        MIN_AMAX=MIN_AMAX,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )


@triton.jit
def _write_latent_kernel(
    latent,
    norm_weight,
    turns,
    cache,
    slot_mapping,
    eps,
    latent_stride,
    turn_stride,
    RANK: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    ROPE_DIM: tl.constexpr,  # noqa: N803
    ROW_WIDTH: tl.constexpr,  # noqa: N803
    BLOCK_ROPE: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    NUM_GROUPS: tl.constexpr,  # noqa: N803
    IS_ENCODED: tl.constexpr,  # noqa: N803
    IS_FP8: tl.constexpr,  # noqa: N803
    MAX_VALUE: tl.constexpr,  # noqa: N803
    MIN_AMAX: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    row = latent + token * latent_stride
    groups = tl.arange(0, NUM_GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_column = columns < RANK
    rope_columns = tl.arange(0, BLOCK_ROPE)[None, :]
    is_rope = rope_columns < ROPE_DIM
    values = tl.load(row + columns, mask=is_column, other=0.0).to(tl.float32)
    factors = tl.load(norm_weight + columns, mask=is_column, other=0.0)
    rope = tl.load(row + RANK + rope_columns, mask=is_rope, other=0.0).to(tl.float32)
    turn = tl.load(turns + token * turn_stride + rope_columns, mask=is_rope, other=0.0)
    sum_of_squares = tl.sum(tl.sum(values * values, 1), 0)
    kv_latent = (rms_normalize(values, sum_of_squares, RANK, eps) * factors).to(latent.dtype.element_ty)
    k_rope = rotate_interleaved(rope, turn).to(latent.dtype.element_ty)

    is_written = slot >= 0
    place = cache + slot * ROW_WIDTH
    if IS_ENCODED:
        kv_latent = kv_latent.to(tl.float32)
        scales = _scale_of(find_amax(kv_latent, 1), MAX_VALUE, MIN_AMAX)
        numbers = _encode(kv_latent, scales[:, None], IS_FP8, MAX_VALUE)
        tl.store(place + columns, numbers, mask=is_column & is_written)
        scale_place = (place + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scale_place + groups, scales, mask=(groups * GROUP < RANK) & is_written)
        scale_bytes: tl.constexpr = 4 * ((RANK + GROUP - 1) // GROUP)
        rope_place = (place + RANK + scale_bytes).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        tl.store(rope_place + rope_columns, k_rope.to(tl.bfloat16), mask=is_rope & is_written)
    else:
        tl.store(place + columns, kv_latent.to(cache.dtype.element_ty), mask=is_column & is_written)
        tl.store(place + RANK + rope_columns, k_rope.to(cache.dtype.element_ty), mask=is_rope & is_written)


@triton.jit
def _write_index_k_kernel(
    key,
    norm_weight,
    norm_bias,
    half_cos,
    half_sin,
    hadamard,
    cache,
    slot_mapping,
    eps,
    key_stride,
    cos_stride,
    sin_stride,
    WIDTH: tl.constexpr,  # noqa: N803
    ROPE_DIM: tl.constexpr,  # noqa: N803
    ROW_WIDTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    LOG_WIDTH: tl.constexpr,  # noqa: N803
    IS_ENCODED: tl.constexpr,  # noqa: N803
    IS_FP8: tl.constexpr,  # noqa: N803
    MAX_VALUE: tl.constexpr,  # noqa: N803
    MIN_AMAX: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    columns = tl.arange(0, BLOCK)
    is_column, is_rope = columns < WIDTH, columns < ROPE_DIM
    half: tl.constexpr = ROPE_DIM // 2
    values = tl.load(key + token * key_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    factors = tl.load(norm_weight + columns, mask=is_column, other=0.0)
    summands = tl.load(norm_bias + columns, mask=is_column, other=0.0)
    cos = tl.load(half_cos + token * cos_stride + columns, mask=is_rope, other=1.0)
    sin = tl.load(half_sin + token * sin_stride + columns, mask=is_rope, other=0.0)
    normed = layer_normalize(values, is_column, WIDTH, eps) * factors + summands
    normed = normed.to(key.dtype.element_ty).to(tl.float32)
    swapped = tl.gather(normed, tl.where(is_rope, (columns + half) % ROPE_DIM, columns), 0)
    index_k = tl.where(is_rope, rotate_half(normed, swapped, cos, sin), normed).to(key.dtype.element_ty)

    is_written = slot >= 0
    place = cache + slot * ROW_WIDTH
    if IS_ENCODED:
        rotated = _transform(index_k.to(tl.float32), WIDTH, LOG_WIDTH) * tl.load(hadamard)
        scale = _scale_of(find_amax(rotated, 0), MAX_VALUE, MIN_AMAX)
        tl.store(place + columns, _encode(rotated, scale, IS_FP8, MAX_VALUE), mask=is_written)
        scale_place = (place + WIDTH).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scale_place, scale, mask=is_written)
    else:
        tl.store(place + columns, index_k.to(cache.dtype.element_ty), mask=is_column & is_written)


@triton.jit
def _transform(x, WIDTH: tl.constexpr, LOG_WIDTH: tl.constexpr):  # noqa: N803
    """``x: [I]`` times Sylvester's matrix of +-1: each step adds and subtracts neighbours, and moves the lowest bit of
    a number's place to the top, so that after all steps every bit has been lowest once and is back."""
    for _ in tl.static_range(LOG_WIDTH):
        left, right = tl.split(tl.reshape(x, (WIDTH // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(left + right, left - right)), (WIDTH,))
    return x


@triton.jit
def _scale_of(amax, MAX_VALUE: tl.constexpr, MIN_AMAX: tl.constexpr):  # noqa: N803
    return tl.div_rn(tl.maximum(amax, MIN_AMAX, propagate_nan=tl.PropagateNan.ALL), MAX_VALUE)


@triton.jit
def _encode(values, scale, IS_FP8: tl.constexpr, MAX_VALUE: tl.constexpr):  # noqa: N803
    """float32 -> the byte of values / scale."""
    quotients = tl.div_rn(values, scale)
    if IS_FP8:
        # NOTE(numerics): a quotient may exceed the maximum by a rounding.
        quotients = tl.minimum(tl.maximum(quotients, -MAX_VALUE), MAX_VALUE)
        encoded = quotients.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        encoded = round_to_int8(quotients).to(tl.uint8, bitcast=True)
    return encoded
