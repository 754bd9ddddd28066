"""The router's choice, and activations."""

import math

import numpy as np

from argosy.kernels.loops.compiled import compiled, inlined
from argosy.kernels.loops.exponential import exp_of_negative
from argosy.kernels.loops.memory import floats, ints


@inlined
def _silu(x):
    """x / (1 + e^-x), from e^-|x|, which cannot overflow."""
    decay = exp_of_negative(-abs(x))
    return x * (decay if x < 0 else np.float32(1)) / (np.float32(1) + decay)


@compiled("void(i8, i8, i8, i8, i8)")
def silu_mul(num_tokens, width, gate_up, stride, out):
    """``gate_up: [T, 2F]`` -> ``out: [T, F]``."""
    for t in range(num_tokens):
        gate, up = floats(gate_up, width, t * stride), floats(gate_up, width, t * stride + width)
        row = floats(out, width, t * width)
        for i in range(width):
            row[i] = _silu(gate[i]) * up[i]


@compiled("void(i8, i8, i8, i8, i8, i8, i8, i8, i8)")
def silu_mul_weighted(num_tokens, num_experts, width, gate_up, token_stride, number_stride, weights, stride, out):
    """``gate_up: [T, E, 2F]``, its numbers ``number_stride`` apart, ``weights: [T, E]``, its rows ``stride`` apart ->
    ``out: [T, E, F]``: zeros, wherever the weight is 0."""
    numbers = np.empty(2 * width, np.float32)
    for t in range(num_tokens):
        weight_of = floats(weights, num_experts, t * stride)
        for e in range(num_experts):
            row = floats(out, width, (t * num_experts + e) * width)
            if weight_of[e] == 0:
                row[:] = 0
                continue
            start = t * token_stride + e * 2 * width * number_stride
            source = floats(gate_up, 2 * width * number_stride, start)
            for i in range(2 * width):
                numbers[i] = source[i * number_stride]
            for i in range(width):
                row[i] = _silu(numbers[i]) * numbers[width + i] * weight_of[e]


@inlined
def _drop_groups(biased, group_size, topk_group):
    """-inf for the experts outside the best ``topk_group`` groups, by the sum of their two best."""
    n_group = biased.shape[0] // group_size
    sums = np.empty(n_group, np.float32)
    for group in range(n_group):
        best, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(group * group_size, (group + 1) * group_size):
            if biased[e] > best:
                best, second = biased[e], best
            elif biased[e] > second:
                second = biased[e]
        sums[group] = best + second
    for group in range(n_group):
        num_better = 0
        for other in range(n_group):
            if sums[other] > sums[group] or (sums[other] == sums[group] and other < group):
                num_better += 1
        if num_better >= topk_group:
            biased[group * group_size : (group + 1) * group_size] = -np.inf


@compiled("void(i8, i8, i8, i8, i8, i8, i8, b1, f4, i8, i8)")
def route_grouped_topk(
    num_tokens, num_experts, num_chosen, logits, bias, n_group, topk_group, is_normed, factor, topk_ids, topk_weights
):
    """``logits: [T, E]``, ``bias: [E]`` -> ``topk_ids: [T, K]`` int32 and ``topk_weights: [T, K]``; ties go to the
    lowest number."""
    scores, biased = np.empty(num_experts, np.float32), np.empty(num_experts, np.float32)
    biases = floats(bias, num_experts)
    for t in range(num_tokens):
        row = floats(logits, num_experts, t * num_experts)
        ids, weights = ints(topk_ids, num_chosen, t * num_chosen), floats(topk_weights, num_chosen, t * num_chosen)
        for e in range(num_experts):
            scores[e] = np.float32(1) / (np.float32(1) + np.float32(math.exp(-row[e])))
            biased[e] = scores[e] + biases[e]
        if n_group > 1:
            _drop_groups(biased, num_experts // n_group, topk_group)
        total = np.float32(0)
        for k in range(num_chosen):
            best = 0
            for e in range(1, num_experts):
                if biased[e] > biased[best]:
                    best = e
            ids[k], weights[k] = best, scores[best]
            total += scores[best]
            biased[best] = -np.inf
        for k in range(num_chosen):
            weights[k] *= factor / total if is_normed else factor


@compiled("void(i8, i8, i8, i8, i8, i8, i8)")
def spread_weights(num_tokens, num_experts, num_chosen, topk_ids, topk_weights, expert_weights, counts):
    """``topk_ids: [T, K]`` int32, -1 none, ``topk_weights: [T, K]`` -> ``expert_weights: [T, E]``, and each expert's
    tokens in ``counts: [E]`` int32."""
    tokens_of = ints(counts, num_experts)
    tokens_of[:] = 0
    for t in range(num_tokens):
        ids, weights = ints(topk_ids, num_chosen, t * num_chosen), floats(topk_weights, num_chosen, t * num_chosen)
        row = floats(expert_weights, num_experts, t * num_experts)
        row[:] = 0
        for k in range(num_chosen):
            if ids[k] >= 0:
                row[ids[k]] = weights[k]
                tokens_of[ids[k]] += 1
