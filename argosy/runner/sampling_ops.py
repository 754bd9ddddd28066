"""The arithmetic of sampling: each function is one step from scores to tokens, on plain tensors.

It knows no rows, requests or settings objects. Ties are always broken by the lowest token id. Invariant: the result for
one line of a batch depends on that line alone.

Shape letters: M lines (rows that need the step), V valid tokens.
"""

import numpy as np
import torch

from argosy.kernels import argmax_rows


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """The best token of each line of ``scores: [N, V]``, any float dtype -> [N] int64."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return torch.from_numpy(scores.numpy().argmax(axis=1))  # vectorised in numpy: 4 to 10 times as fast on a CPU
    # Widening to float32 is exact and keeps the order, so argmax may be taken before it.
    return argmax_rows(scores)


def mask_outside_words(scores: torch.Tensor, words: torch.Tensor) -> None:
    """Mask, in place, the tokens of ``scores: [M, V]`` whose bit in ``words: [M, W]`` int32 is 0.

    Bit i of word w stands for token 32 w + i; bits behind token V are not read.
    """
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = ((words[:, :, None] >> places) & 1).flatten(1)  # [M, 32 W]
    scores.masked_fill_(bits[:, : scores.shape[1]] == 0, -torch.inf)


def penalize(
    scores: torch.Tensor,
    all_counts: torch.Tensor,
    output_counts: torch.Tensor,
    *,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Penalised ``scores: [M, V]`` f32; counts [M, V] of prompt + output and of output; penalties [M, 1]."""
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(all_counts > 0, repeated, scores)
    return scores - frequency * output_counts - presence * (output_counts > 0)


def count_tokens(token_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """How often each id below ``num_tokens`` stands in a line of ``token_ids: [M, L]`` int64 -> [M, V] f32.

    Entries equal to ``num_tokens`` are padding.
    """
    counts = torch.zeros(token_ids.shape[0], num_tokens + 1, device=token_ids.device)
    counts.scatter_add_(1, token_ids, torch.ones((), device=token_ids.device).expand(token_ids.shape))
    return counts[:, :num_tokens]


def scale_by_temperature(scores: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """``(scores - max) / temperature``, a new [M, V]: at most 0, with a 0 in every line; temperature [M, 1]."""
    return (scores - scores.amax(dim=1, keepdim=True)).div_(temperature)


def mask_below_min_p(scores: torch.Tensor, min_p: torch.Tensor) -> None:
    """Mask, in place, tokens less likely than ``min_p`` [M, 1] times the likeliest; ``scores`` as just scaled."""
    # exp(score) is the ratio to the likeliest already, so no softmax is needed; log(0) = -inf masks nothing.
    scores.masked_fill_(scores < min_p.log(), -torch.inf)


def mask_outside_top(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, max_top_k: int) -> None:
    """Mask, in place, all but the ``top_k`` likeliest tokens, then all but the fewest of those that hold ``top_p``.

    Args:
        scores: [M, V] f32, as scaled (at most 0).
        top_k: [M, 1] int64 in [1, V].
        top_p: [M, 1] f64 in (0, 1]; a share of the mass that top-k left.
        max_top_k: the largest of ``top_k``; the sort is cut there.
    """
    ranked = _top_values(scores, max_top_k)  # [M, k], best first
    is_kept = torch.arange(max_top_k, device=scores.device) < top_k
    mass = ranked.exp().double() * is_kept
    reached = mass.cumsum(dim=1)
    # A token stays while those before it hold less than top_p, so the first always does. With top_p = 1 rounding may
    # cut tokens of less than 1e-16 of the mass, which no draw of 52 bits could reach.
    is_kept &= reached - mass < top_p * reached[:, -1:]
    num_kept = is_kept.sum(dim=1, keepdim=True)
    # Values were sorted without their ids, which is far cheaper; so of the tokens that tie with the last one kept, the
    # lowest ids are found by counting.
    last = ranked.gather(1, num_kept - 1)
    is_above, is_tied = scores > last, scores == last
    num_tied_kept = num_kept - is_above.sum(dim=1, keepdim=True)
    is_above |= is_tied & (is_tied.cumsum(dim=1, dtype=torch.int32) <= num_tied_kept)
    scores.masked_fill_(is_above.logical_not_(), -torch.inf)


def draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token per line by inverse CDF over token ids: ``scores: [M, V]`` as scaled -> [M] int64.

    ``uniform: [M, 1]`` f64 in (0, 1). The token is the first whose cumulative mass reaches ``uniform * total``, which
    is above 0; a masked token adds nothing to the sum, so it is never the first to reach anything.
    """
    # NOTE(numerics): masses are exp in fp32, but their running sum is fp64: over 129,280 tokens its error is below
    # 2e-11, where an fp32 sum could shift probabilities by 8e-3 in the worst case.
    reached = scores.exp().cumsum(dim=1, dtype=torch.float64)
    token_ids = torch.searchsorted(reached, uniform * reached[:, -1:])
    return token_ids.squeeze(1).clamp_(max=scores.shape[1] - 1)  # only NaN scores could pass the end


def rank_tokens(scores: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The ``num_ranks`` best token ids of each line of ``scores: [M, V]`` f32, best first -> [M, num_ranks] int64."""
    num_tokens = scores.shape[1]
    # topk alone leaves ties open. Float bits, negatives flipped, order as integers; ids fill the low half of the key.
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0, its equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    falling_ids = torch.arange(num_tokens - 1, -1, -1, device=scores.device)
    keys = (ordered << 32) | falling_ids
    return num_tokens - 1 - (keys.topk(num_ranks, dim=1).values & 0xFFFFFFFF)


def rank_of(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The rank, from 1, of ``token_ids: [M]`` in its line of ``scores: [M, V]``, as ``rank_tokens`` orders -> [M]."""
    chosen = token_ids[:, None]
    score = scores.gather(1, chosen)
    ids = torch.arange(scores.shape[1], device=scores.device)
    return ((scores > score) | ((scores == score) & (ids < chosen))).sum(dim=1) + 1


def measure_tokens(scores: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``token_ids: [M]`` and the ``num_top`` likeliest tokens of each line of ``scores: [M, V]`` f32 -> ids
    [M, 2 + num_top] int64 (the token, its rank, the likeliest) and log probabilities [M, 1 + num_top] f32."""
    values, chosen = scores.log_softmax(dim=1), token_ids[:, None]  # [M, V], [M, 1]
    top = rank_tokens(values, num_top)
    ids = torch.cat((chosen, rank_of(values, token_ids)[:, None], top), dim=1)
    return ids, values.gather(1, torch.cat((chosen, top), dim=1))


def _top_values(scores: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The ``num_ranks`` best scores of each line, best first."""
    if scores.device.type == "cpu":
        # numpy sorts plain float32 with vector instructions: 20 to 30 times as fast as torch's sort of pairs.
        return torch.from_numpy(np.sort(scores.numpy(), axis=1)).flip(1)[:, :num_ranks]
    return scores.topk(num_ranks, dim=1).values
