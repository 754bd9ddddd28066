"""Operations that a CPU does faster in another form than ``reference.py``'s.

A decode step of a small model is hundreds of calls on a few kilobytes each, so a call's fixed cost is what counts:
arithmetic on integers goes through numpy, whose calls cost a fifth of torch's and whose sort uses vector instructions.
Invariant: each function is the fast twin of the one of the same name in ``reference.py``; tests hold them equal.

Shape letters: see ``reference.py``; e experts, M sorted rows.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from argosy.kernels import reference

# Below these, grouped_mlp pads: rows in all, and padded rows per row.
_MAX_PADDED_ROWS = 1024
_MAX_PADDING = 3
_MIN_LEFT_TOKENS = 8  # of weighted_mlp
_NEVER = np.iinfo(np.int64).min  # a key below every score's
_LOW_BITS = np.int32(0x7FFFFFFF)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """sqrt(mean(x^2) + eps) is the hypotenuse of |x| and sqrt(n * eps), over sqrt(n): four calls instead of eight."""
    size = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    # Tensors, for Python's numbers are converted at every call.
    scale = length.hypot_(_constant(math.sqrt(size * eps))).mul_(_constant(size**-0.5))
    normed = (x / scale).mul_(weight)
    return normed if x.dtype == torch.float32 else normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the two operations one after the other."""
    total = x + delta
    total = total if total.dtype == x.dtype else total.to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Without conversions that change nothing."""
    if gate_up.dtype != torch.float32:
        return reference.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def select_topk_slots(
    scores: torch.Tensor, num_visible: torch.Tensor, topk: int, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """A full sort of the same packed keys, made of halves: for these sizes faster than a partial one."""
    num_rows, num_keys = scores.shape
    visible = num_visible.numpy()
    bits = (scores.numpy() + np.float32(0.0)).view(np.int32)  # + 0.0 turns -0.0 into 0.0
    flip = bits >> 31
    flip &= _LOW_BITS
    low = _LOW_BITS - _arange(num_keys)
    halves = np.empty((num_rows, num_keys, 2), dtype=np.int32)  # little end first
    halves[:, :, 0] = low
    np.bitwise_xor(bits, flip, out=halves[:, :, 1])  # monotone in the float's value
    keys = halves.view(np.int64)[:, :, 0]
    fewest = int(visible.min(initial=num_keys))
    if fewest < num_keys:
        keys[low <= _LOW_BITS - visible[:, None]] = _NEVER
    keys.sort(axis=1)
    chosen = _LOW_BITS - halves[:, : -topk - 1 : -1, 0]  # from the highest down
    if fewest < topk:
        chosen[keys[:, : -topk - 1 : -1] == _NEVER] = 0
    blocks = block_table.numpy()
    row = _arange(blocks.shape[0])[:, None]  # one row serves all tokens
    found = blocks[row, chosen // block_size].astype(np.int64)
    found *= block_size
    found += chosen % block_size
    if fewest >= topk:
        return torch.from_numpy(found)
    found[np.arange(found.shape[1]) >= visible[:, None]] = -1
    slots = np.full((num_rows, topk), -1, dtype=np.int64)
    slots[:, : found.shape[1]] = found
    return torch.from_numpy(slots)


@functools.lru_cache(maxsize=64)
def _arange(end: int) -> np.ndarray:
    """int32, not to be written to: a sequence's length, or a batch's."""
    return np.arange(end, dtype=np.int32)


def route_grouped_topk(
    router_logits: torch.Tensor,
    correction_bias: torch.Tensor,
    *,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full sorts of short rows. Ties go to the lowest number; ``reference`` leaves them open."""
    num_tokens, num_experts = router_logits.shape
    scores = router_logits.sigmoid().numpy()
    biased = scores + correction_bias.numpy()
    row = np.arange(num_tokens)[:, None]
    if n_group > 1:
        grouped = biased.reshape(num_tokens, n_group, num_experts // n_group)
        ascending = np.sort(grouped, axis=2)
        group_scores = ascending[:, :, -1] + ascending[:, :, -2]  # [T, n_group]
        dropped = (-group_scores).argsort(axis=1, kind="stable")[:, topk_group:]
        grouped[row, dropped] = -np.inf
    topk_ids = (-biased).argsort(axis=1, kind="stable")[:, :num_experts_per_tok]
    weights = scores[row, topk_ids]
    if norm_topk_prob:
        weights /= weights.sum(axis=1, keepdims=True)
    weights *= np.float32(routed_scaling_factor)
    return torch.from_numpy(topk_ids.astype(np.int32)), torch.from_numpy(weights)


def grouped_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, num_tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Few rows are padded to the busiest expert's count: one batched product then costs less than one per expert."""
    counts = num_tokens_per_expert.numpy()
    busiest = int(counts.max(initial=0))
    if 0 < x.shape[0] <= _MAX_PADDED_ROWS and len(counts) * busiest <= _MAX_PADDING * x.shape[0]:
        return _padded_mlp(x, gate_up_proj, down_proj, counts, busiest)
    return _mlp_of_busy_experts(x, gate_up_proj, down_proj, counts)


@functools.cache
def _constant(value: float) -> torch.Tensor:
    """A norm's epsilon: one of a few in a process."""
    return torch.tensor(value, device="cpu")


def silu_mul_weighted(gate_up: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
    """``silu_mul`` of every expert, times its weight: ``gate_up: [T, e, 2F]``, ``expert_weights: [T, e]`` ->
    [T, e, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(expert_weights.unsqueeze(2))


def weighted_mlp(
    x: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    expert_weights: torch.Tensor,
    activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = silu_mul_weighted,
) -> torch.Tensor:
    """Two products over all experts at once, ``activate`` between them.

    NOTE(numerics): weighted before the second product, whose sum then runs over all experts.
    """
    num_experts, joined_width, hidden_size = gate_up_proj.shape
    num_tokens, width = x.shape[0], joined_width // 2
    matrix = gate_up_proj.reshape(num_experts * joined_width, hidden_size)
    # MKL reads so wide a matrix faster from the left, when there are enough tokens to its right.
    is_left = num_tokens >= _MIN_LEFT_TOKENS
    gate_up = torch.mm(matrix, x.t()).t() if is_left else F.linear(x, matrix)
    hidden = activate(gate_up.view(num_tokens, num_experts, joined_width), expert_weights)
    down = down_proj.transpose(0, 1).reshape(hidden_size, num_experts * width)
    return F.linear(hidden.view(num_tokens, num_experts * width), down)


def _padded_mlp(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, counts: np.ndarray, busiest: int
) -> torch.Tensor:
    num_experts, hidden_size = len(counts), x.shape[1]
    # Row r of expert i goes to place i * busiest + r: its number, plus the padding of the experts before it.
    padding_before = np.arange(num_experts) * busiest - (counts.cumsum() - counts)
    place = torch.from_numpy(np.arange(x.shape[0]) + padding_before.repeat(counts))
    padded = x.new_zeros(num_experts * busiest, hidden_size).index_copy_(0, place, x)
    gate_up = torch.bmm(padded.view(num_experts, busiest, hidden_size), gate_up_proj.transpose(1, 2))
    out = torch.bmm(silu_mul(gate_up), down_proj.transpose(1, 2))
    return out.view(num_experts * busiest, hidden_size).index_select(0, place)


def _mlp_of_busy_experts(
    x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, counts: np.ndarray
) -> torch.Tensor:
    """One expert after another, the idle ones left out: ``F.grouped_mm`` would visit them all."""
    out = torch.empty_like(x)
    end = 0
    for expert in np.flatnonzero(counts).tolist():
        start, end = end, end + int(counts[expert])
        hidden = silu_mul(F.linear(x[start:end], gate_up_proj[expert]))
        torch.mm(hidden, down_proj[expert].t(), out=out[start:end])
    return out
