"""Norms, alone and with what follows them on the way into the cache."""

import math

import numpy as np

from argosy.kernels.loops.compiled import compiled, inlined
from argosy.kernels.loops.memory import floats, longs


@inlined
def _norm_into(row, weight, eps, out):
    """RMSNorm of as many numbers as there are weights."""
    size, squares = weight.shape[0], np.float32(0)
    for i in range(size):
        squares += row[i] * row[i]
    factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(size) + eps))
    for i in range(size):
        out[i] = row[i] * factor * weight[i]


@compiled("void(i8, i8, i8, i8, i8, f4, i8)")
def rms_norm(num_tokens, size, x, x_stride, weight, eps, out):
    """``x: [T, n]``, its rows ``x_stride`` apart -> ``out: [T, n]``."""
    weights = floats(weight, size)
    for t in range(num_tokens):
        _norm_into(floats(x, size, t * x_stride), weights, eps, floats(out, size, t * size))


@compiled("void(i8, i8, i8, i8, i8, i8, i8, f4, i8, i8)")
def add_rms_norm(num_tokens, size, x, x_stride, delta, delta_stride, weight, eps, out, total):
    """``x + delta: [T, n]`` -> ``total: [T, n]``, and its norm -> ``out``."""
    weights = floats(weight, size)
    for t in range(num_tokens):
        row, delta_row = floats(x, size, t * x_stride), floats(delta, size, t * delta_stride)
        total_row = floats(total, size, t * size)
        for i in range(size):
            total_row[i] = row[i] + delta_row[i]
        _norm_into(total_row, weights, eps, floats(out, size, t * size))


@compiled("void(i8, i8, i8, i8, i8, i8, f4, i8, i8, i8)")
def write_latent(num_tokens, rank, rope_dim, latent, latent_stride, weight, eps, turns, cache, slots):
    """RMSNorm of the first R, the last P rotated in pairs: ``latent: [T, R + P]`` -> rows ``slots: [T]`` int64 of
    ``cache: [slots, R + P]``. ``turns: [T, P / 2]`` complex; slot -1 writes nothing."""
    width, weights, slot_of = rank + rope_dim, floats(weight, rank), longs(slots, num_tokens)
    for t in range(num_tokens):
        if slot_of[t] < 0:
            continue
        token, row = floats(latent, width, t * latent_stride), floats(cache, width, slot_of[t] * width)
        _norm_into(token, weights, eps, row)
        turn = floats(turns, rope_dim, t * rope_dim)
        for i in range(0, rope_dim, 2):
            a, b = token[rank + i], token[rank + i + 1]
            row[rank + i] = a * turn[i] - b * turn[i + 1]
            row[rank + i + 1] = a * turn[i + 1] + b * turn[i]


@compiled("void(i8, i8, i8, i8, i8, i8, i8, f4, i8, i8, i8, i8)")
def write_index_k(num_tokens, size, rope_dim, key, key_stride, weight, bias, eps, half_cos, half_sin, cache, slots):
    """LayerNorm, then the first P rotated by halves: ``key: [T, I]`` -> rows ``slots: [T]`` int64 of ``cache: [slots,
    I]``. ``half_cos: [T, P]`` and ``half_sin``; slot -1 writes nothing."""
    weights, biases, slot_of = floats(weight, size), floats(bias, size), longs(slots, num_tokens)
    half = rope_dim // 2
    for t in range(num_tokens):
        if slot_of[t] < 0:
            continue
        token, row = floats(key, size, t * key_stride), floats(cache, size, slot_of[t] * size)
        total, squares = np.float32(0), np.float32(0)
        for i in range(size):
            total += token[i]
        mean = total / np.float32(size)
        for i in range(size):
            squares += (token[i] - mean) * (token[i] - mean)
        factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(size) + eps))
        for i in range(size):
            row[i] = (token[i] - mean) * factor * weights[i] + biases[i]
        cos, sin = floats(half_cos, rope_dim, t * rope_dim), floats(half_sin, rope_dim, t * rope_dim)
        for i in range(half):
            a, b = row[i], row[half + i]
            row[i] = a * cos[i] + b * sin[i]
            row[half + i] = b * cos[half + i] + a * sin[half + i]
