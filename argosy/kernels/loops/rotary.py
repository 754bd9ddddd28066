"""Rotations, and the angles of a step."""

from argosy.kernels.loops.compiled import compiled
from argosy.kernels.loops.memory import floats, longs


@compiled("void(i8, i8, i8, i8, i8, i8, i8, i8)")
def gather_rows(num_tokens, half, cos, sin, positions, turns, half_cos, half_sin):
    """``cos: [max_positions, P / 2]`` and ``sin`` at ``positions: [T]`` int64 -> ``turns: [T, P / 2]`` complex,
    ``half_cos: [T, P]`` and ``half_sin``, as ``RotaryRows`` has them."""
    position_of = longs(positions, num_tokens)
    for t in range(num_tokens):
        c, s = floats(cos, half, position_of[t] * half), floats(sin, half, position_of[t] * half)
        start = 2 * half * t
        turn, cosines, sines = (
            floats(turns, 2 * half, start),
            floats(half_cos, 2 * half, start),
            floats(half_sin, 2 * half, start),
        )
        for i in range(half):
            turn[2 * i], turn[2 * i + 1] = c[i], s[i]
            cosines[i] = cosines[half + i] = c[i]
            sines[i], sines[half + i] = -s[i], s[i]


@compiled("void(i8, i8, i8, i8, i8, i8, i8, i8, i8, i8)")
def rotate_pairs(num_tokens, num_heads, rope_dim, x, x_stride, x_head_stride, turns, out, out_stride, out_head_stride):
    """``x: [T, heads, P]`` -> ``out``, which may be x; ``turns: [T, P / 2]`` complex."""
    for t in range(num_tokens):
        turn = floats(turns, rope_dim, t * rope_dim)
        for head in range(num_heads):
            row = floats(x, rope_dim, t * x_stride + head * x_head_stride)
            turned = floats(out, rope_dim, t * out_stride + head * out_head_stride)
            for i in range(0, rope_dim, 2):
                a, b = row[i], row[i + 1]
                turned[i] = a * turn[i] - b * turn[i + 1]
                turned[i + 1] = a * turn[i + 1] + b * turn[i]


@compiled("void(i8, i8, i8, i8, i8, i8, i8, i8)")
def rotate_halves(num_tokens, num_heads, rope_dim, x, x_stride, x_head_stride, half_cos, half_sin):
    """``x: [T, heads, P]`` in place; ``half_cos: [T, P]`` and ``half_sin``."""
    half = rope_dim // 2
    for t in range(num_tokens):
        cos, sin = floats(half_cos, rope_dim, t * rope_dim), floats(half_sin, rope_dim, t * rope_dim)
        for head in range(num_heads):
            row = floats(x, rope_dim, t * x_stride + head * x_head_stride)
            for i in range(half):
                a, b = row[i], row[half + i]
                row[i] = a * cos[i] + b * sin[i]
                row[half + i] = b * cos[half + i] + a * sin[half + i]
