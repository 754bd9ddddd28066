"""Rotary embeddings of both pair layouts, and the rotations themselves: what is made is read once and written once.

Plain torch widens, views, multiplies and copies back in passes of their own; and looks up, joins and negates a step's
cosines and sines in six. Invariant: the same products and sums in
float32 as ``reference.py`` on a card, fused where its kernels fuse, then one rounding to the tensor's dtype.

Shape letters: T tokens, P numbers of a head that are rotated.
"""

import torch
import triton
import triton.language as tl

from argosy.kernels.reference import RotaryRows, RotaryTable
from argosy.kernels.triton.dependent_launch import IS_ON, let_next_start, wait_for_inputs

# Numbers of one program, which are heads of one token. Not measured yet.
BLOCK_NUMBERS = 2048
NUM_WARPS = 4


def rotary_rows(table: RotaryTable, positions: torch.Tensor) -> RotaryRows:
    """See ``reference.RotaryTable.at``: ``positions: [T]`` int64, contiguous."""
    num_tokens, half = positions.shape[0], table.cos.shape[1]
    turns = table.cos.new_empty(num_tokens, 1, half, 2)
    half_cos, half_sin = table.cos.new_empty(2, num_tokens, 1, 2 * half).unbind(0)
    if num_tokens:
        _rotary_rows_kernel[(num_tokens,)](
            table.cos,
            table.sin,
            positions,
            turns,
            half_cos,
            half_sin,
            HALF=half,
            BLOCK=triton.next_power_of_2(half),
            num_warps=1,
            launch_pdl=IS_ON,
        )
    return RotaryRows(torch.view_as_complex(turns), half_cos, half_sin)


def rope_interleaved_(x: torch.Tensor, rotary: RotaryRows) -> None:
    """See ``reference.rope_interleaved_``: ``x: [T, heads, P]``, tokens and heads strided."""
    rope_interleaved_into(x, rotary, x)


def rope_interleaved_into(x: torch.Tensor, rotary: RotaryRows, out: torch.Tensor) -> None:
    """See ``reference.rope_interleaved_into``; x stays as it is, but where it is ``out``."""
    num_tokens, num_heads, rope_dim = x.shape
    if num_tokens * num_heads == 0:
        return
    turns = torch.view_as_real(rotary.turns)  # [T, 1, P / 2, 2]
    block_heads, num_blocks = _split_heads(num_heads, rope_dim)
    _rope_interleaved_kernel[(num_tokens * num_blocks,)](
        x,
        out,
        turns,
        num_heads,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        turns.stride(0),
        NUM_BLOCKS=num_blocks,
        ROPE_DIM=rope_dim,
        BLOCK_ROPE=triton.next_power_of_2(rope_dim),
        BLOCK_HEADS=block_heads,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )


def rope_half_split_(x: torch.Tensor, rotary: RotaryRows) -> None:
    """See ``reference.rope_half_split_``: ``x: [T, heads, P]``, tokens and heads strided."""
    num_tokens, num_heads, rope_dim = x.shape
    if num_tokens * num_heads == 0:
        return
    block_heads, num_blocks = _split_heads(num_heads, rope_dim)
    _rope_half_split_kernel[(num_tokens * num_blocks,)](
        x,
        rotary.half_cos,
        rotary.half_sin,
        num_heads,
        x.stride(0),
        x.stride(1),
        rotary.half_cos.stride(0),
        rotary.half_sin.stride(0),
        NUM_BLOCKS=num_blocks,
        HALF=rope_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(rope_dim // 2),
        BLOCK_HEADS=block_heads,
        num_warps=NUM_WARPS,
        launch_pdl=IS_ON,
    )


def _split_heads(num_heads: int, rope_dim: int) -> tuple[int, int]:
    """Heads of a program, and programs of a token."""
    block_heads = max(1, min(triton.next_power_of_2(num_heads), BLOCK_NUMBERS // triton.next_power_of_2(rope_dim)))
    return block_heads, triton.cdiv(num_heads, block_heads)


@triton.jit
def _rotary_rows_kernel(
    cos,
    sin,
    positions,
    turns,
    half_cos,
    half_sin,
    HALF: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    BLOCK: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < HALF
    places = tl.load(positions + token) * HALF + columns
    cosines = tl.load(cos + places, mask=is_column, other=0.0)
    sines = tl.load(sin + places, mask=is_column, other=0.0)
    first = token * 2 * HALF
    tl.store(turns + first + columns * 2, cosines, mask=is_column)
    tl.store(turns + first + columns * 2 + 1, sines, mask=is_column)
    tl.store(half_cos + first + columns, cosines, mask=is_column)
    tl.store(half_cos + first + HALF + columns, cosines, mask=is_column)
    tl.store(half_sin + first + columns, -sines, mask=is_column)
    tl.store(half_sin + first + HALF + columns, sines, mask=is_column)


@triton.jit
def _rope_interleaved_kernel(
    x,
    out,
    turns,
    num_heads,
    token_stride,
    head_stride,
    out_token_stride,
    out_head_stride,
    turn_stride,
    NUM_BLOCKS: tl.constexpr,  # noqa: N803 - Triton's compile-time constants are written so
    ROPE_DIM: tl.constexpr,  # noqa: N803
    BLOCK_ROPE: tl.constexpr,  # noqa: N803
    BLOCK_HEADS: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    heads = (tl.program_id(0) % NUM_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_ROPE)[None, :]
    is_column = columns < ROPE_DIM
    is_number = (heads < num_heads) & is_column
    places = x + token * token_stride + heads * head_stride + columns
    values = tl.load(places, mask=is_number, other=0.0).to(tl.float32)
    turn = tl.load(turns + token * turn_stride + columns, mask=is_column, other=0.0)
    out_places = out + token * out_token_stride + heads * out_head_stride + columns
    tl.store(out_places, rotate_interleaved(values, turn).to(out.dtype.element_ty), mask=is_number)


@triton.jit
def _rope_half_split_kernel(
    x,
    half_cos,
    half_sin,
    num_heads,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    NUM_BLOCKS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    BLOCK_HALF: tl.constexpr,  # noqa: N803
    BLOCK_HEADS: tl.constexpr,  # noqa: N803
):
    let_next_start()
    wait_for_inputs()
    token = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    heads = (tl.program_id(0) % NUM_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    is_column = columns < HALF
    is_number = (heads < num_heads) & is_column
    places = x + token * token_stride + heads * head_stride + columns
    first = tl.load(places, mask=is_number, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=is_number, other=0.0).to(tl.float32)
    # Both halves have the same cosines; the sines of the first half are those of the second, negated.
    cos = tl.load(half_cos + token * cos_stride + columns, mask=is_column, other=0.0)
    sin = tl.load(half_sin + token * sin_stride + HALF + columns, mask=is_column, other=0.0)
    tl.store(places, rotate_half(first, second, cos, -sin).to(x.dtype.element_ty), mask=is_number)
    tl.store(places + HALF, rotate_half(second, first, cos, sin).to(x.dtype.element_ty), mask=is_number)


@triton.jit
def rotate_half(values, swapped, cos, sin):
    # NOTE(numerics): torch rounds the first product, for it is a tensor, and fuses the second into the sum.
    return tl.fma(swapped, sin, values * cos)


@triton.jit
def rotate_interleaved(values, turns):
    """``values: [h, P]`` f32 and ``turns: [1, P]`` f32, both in pairs -> [h, P] f32."""
    even, odd = _split_pairs(values)
    cos, sin = _split_pairs(turns)
    # NOTE(numerics): a complex product as C++ writes it; which product is rounded is nvcc's choice, and ours.
    real = tl.fma(even, cos, -(odd * sin))
    imaginary = tl.fma(even, sin, odd * cos)
    return tl.reshape(tl.join(real, imaginary), values.shape)


@triton.jit
def _split_pairs(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
