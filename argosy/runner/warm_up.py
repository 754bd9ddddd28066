"""Steps that are run before the first request, so that no kernel is compiled while one waits.

A kernel is compiled anew for another tile, and kernels choose tiles by numbers of tokens, of decoding requests, and of
positions that are scored. What else differs between steps they are told not to look at. So trials of a ladder of each
number meet all of them; they compute on a cache of one block, and what they compute means nothing. Invariant:
``plan_warm_up`` is a pure function of sizes, so all ranks of a deployment run the same trials in the same order.

Shape letters: T tokens of a step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from argosy.cache.cache_format import CacheFormat
from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.distributed.ep_types import ExchangeOf
from argosy.kernels import RotaryTable
from argosy.messages import ScheduledBatch
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.runner.batch_builder import BatchBuilder
from argosy.runner.row_table import RowTable
from argosy.runner.sampling_ops import argmax
from argosy.runner.workspace import plan_trial

Trial = tuple[tuple[int, int], ...]  # computed and scheduled tokens of each request, decodes first
OnTrial = Callable[[int, int], None]  # trials run, trials in all

# Chunks behind a context: of a few tokens, then around two rows for each multiprocessor of a card; what is hidden by a
# mask is computed in blocks of 128 queries, of which 240 and 320 fill more than 272 do.
FEW_TOKENS = 17
CHUNKS = (FEW_TOKENS, 240, 272, 320)
LONGEST_MASKED = 16384  # contexts up to here: behind longer ones the largest chunk goes the way of other chunks
LAST_NEIGHBOUR = 1024  # above, tiles are chosen by more than one token more or less


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUpSizes:
    """What a running engine can meet."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    index_topk: int


def ladder(limit: int) -> tuple[int, ...]:
    """1 .. ``limit``, ascending: powers of two, what lies half-way, and behind the smaller powers the next number."""
    numbers = {1, limit}
    power = 2
    while power <= limit:
        numbers |= {power, power * 3 // 2}
        if power <= LAST_NEIGHBOUR:
            numbers.add(power + 1)
        power *= 2
    return tuple(sorted(number for number in numbers if number <= limit))


def plan_warm_up(sizes: WarmUpSizes) -> tuple[Trial, ...]:
    """Each trial once, the largest first: what it takes of the memory, the others use again."""
    trials = {*_prompts(sizes), *_chunks(sizes), *_decodes(sizes), *_mixtures(sizes)}
    return tuple(sorted(trials, key=lambda trial: (sum(scheduled for _, scheduled in trial), trial), reverse=True))


@torch.inference_mode()
def warm_up(
    model: DeepseekV32Model,
    cache_format: CacheFormat,
    rotary: RotaryTable,
    trials: tuple[Trial, ...],
    *,
    block_size: int,
    vocab_size: int,
    exchange_of: ExchangeOf,
    on_trial: OnTrial | None = None,
) -> None:
    """Runs the trials through one layer of each kind, the head and a greedy choice. Collective over the replica and
    over ep."""
    device, num_layers = rotary.cos.device, model.num_distinct_layers
    cache = MLAKVCache(cache_format, num_layers=num_layers, num_blocks=1, block_size=block_size, device=device)
    for i, trial in enumerate(trials):
        batch = plan_trial(trial, vocab_size)
        built = BatchBuilder(_empty_table(batch, block_size), rotary, device).build(
            batch, exchange_of(batch.num_tokens)
        )
        hidden_states = model(built.forward, cache, num_layers)
        rows = built.forward.logits_indices
        argmax(model.compute_logits(model.take_rows(hidden_states, rows, built.forward.num_tokens)))
        if on_trial is not None:
            on_trial(i + 1, len(trials))


def _prompts(sizes: WarmUpSizes) -> Iterator[Trial]:
    """Every number of tokens, as new prompts."""
    for num_tokens in ladder(sizes.max_num_batched_tokens):
        num_whole, rest = divmod(num_tokens, sizes.max_model_len)
        lengths = [sizes.max_model_len] * num_whole + [rest] * (rest > 0)
        # A single token is a decode, and those stand first.
        yield tuple((0, length) for length in sorted(lengths[: sizes.max_num_seqs], key=lambda length: length != 1))


def _chunks(sizes: WarmUpSizes) -> Iterator[Trial]:
    """Behind contexts of every length: chunks of a few tokens, of more, and of as many as there can be."""
    most = sizes.max_num_batched_tokens
    for length in _lengths(sizes):
        chunks = (*CHUNKS, most) if length <= LONGEST_MASKED else CHUNKS
        for num_tokens in chunks:
            if num_tokens < min(length, most + 1):
                yield ((length - num_tokens, num_tokens),)


def _decodes(sizes: WarmUpSizes) -> Iterator[Trial]:
    """Every number of requests, with and without a choice of positions, whose number may or may not be known; then
    contexts of every length, of one request and of as many as there can be."""
    most = min(sizes.max_num_seqs, sizes.max_num_batched_tokens)
    short, long = (min(length, sizes.max_model_len) - 1 for length in (sizes.index_topk, sizes.index_topk + 1))
    for num_requests in ladder(most):
        for computed in (0, short, long):
            yield ((computed, 1),) * num_requests
        yield ((long, 1),) + ((0, 1),) * (num_requests - 1)
    for length in _lengths(sizes):
        for num_requests in (1, most):
            yield ((length - 1, 1),) + ((0, 1),) * (num_requests - 1)


def _mixtures(sizes: WarmUpSizes) -> Iterator[Trial]:
    """Decodes beside a prompt, each with and without a choice of positions."""
    if sizes.max_num_seqs < 2 or sizes.max_num_batched_tokens <= FEW_TOKENS:
        return
    longest = min(sizes.max_model_len, sizes.index_topk + FEW_TOKENS)
    for decode_length in (min(FEW_TOKENS, sizes.max_model_len), longest):
        for prompt_length in (min(FEW_TOKENS, sizes.max_model_len), longest):
            scheduled = min(FEW_TOKENS, prompt_length)
            yield ((decode_length - 1, 1), (prompt_length - scheduled, scheduled))


def _lengths(sizes: WarmUpSizes) -> tuple[int, ...]:
    """Contexts on both sides of every power of two that need a choice of positions."""
    powers = [1 << exponent for exponent in range(sizes.max_model_len.bit_length())]
    lengths = {sizes.index_topk + 1, sizes.max_model_len, *powers, *(power + 1 for power in powers)}
    return tuple(sorted(length for length in lengths if sizes.index_topk < length <= sizes.max_model_len))


def _empty_table(batch: ScheduledBatch, block_size: int) -> RowTable:
    """All zeros: every position lies in block 0."""
    longest = max(
        computed + scheduled
        for computed, scheduled in zip(batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True)
    )
    table = RowTable(max_num_seqs=len(batch.rows), max_model_len=longest, block_size=block_size)
    table.apply(batch)
    return table
