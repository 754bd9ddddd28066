"""Plans of the steps that are measured: what a scheduler would hand to the runner, without a scheduler.

Nothing is run here and no device is asked. Invariant: a row's blocks are as many as its tokens fill, never more, and
block 0 belongs to nobody.
"""

from collections.abc import Iterator

import numpy as np

from argosy.messages import AdmittedRequest, ScheduledBatch
from argosy.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
FIRST_ID = 10  # ids below may mean something to a tokenizer


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def longest_row(context: int, num_steps: int, prefills: list[int]) -> int:
    """``max_model_len`` that holds every row of these plans; a row table has a place behind it for the last sampled
    token, which no step computes."""
    return max([context + num_steps, *prefills])


def plan_decode(
    batch_size: int, context: int, num_steps: int, *, block_size: int, vocab_size: int
) -> list[ScheduledBatch]:
    """Requests whose ``context`` tokens count as computed: the cache holds something everywhere."""
    blocks_each = blocks_for(context + num_steps, block_size)
    admitted = [
        AdmittedRequest(
            row=row,
            request_id=str(row),
            token_ids=draw_tokens(context + 1, vocab_size, seed=row),
            num_prompt_tokens=context + 1,
            num_computed_tokens=context,
            block_ids=list(range(1 + row * blocks_each, 1 + (row + 1) * blocks_each)),
            sampling_params=GREEDY,
        )
        for row in range(batch_size)
    ]
    return [
        ScheduledBatch(
            step=step,
            rows=list(range(batch_size)),
            num_computed_tokens=[context + step] * batch_size,
            num_scheduled_tokens=[1] * batch_size,
            admitted=admitted if step == 0 else [],
            num_tokens=batch_size,
        )
        for step in range(num_steps)
    ]


def plan_prefill(num_tokens: int, *, chunk: int, block_size: int, vocab_size: int) -> list[ScheduledBatch]:
    """One request in steps of at most ``chunk`` tokens; the last samples."""
    request = AdmittedRequest(
        row=0,
        request_id="prefill",
        token_ids=draw_tokens(num_tokens, vocab_size, seed=num_tokens),
        num_prompt_tokens=num_tokens,
        num_computed_tokens=0,
        block_ids=list(range(1, 1 + blocks_for(num_tokens, block_size))),
        sampling_params=GREEDY,
    )
    return [
        ScheduledBatch(
            step=step,
            rows=[0],
            num_computed_tokens=[start],
            num_scheduled_tokens=[num_scheduled],
            admitted=[request] if start == 0 else [],
            num_tokens=num_scheduled,
        )
        for step, (start, num_scheduled) in enumerate(cut(num_tokens, chunk))
    ]


def cut(num_tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(start, length) of each chunk."""
    for start in range(0, num_tokens, chunk):
        yield start, min(chunk, num_tokens - start)


def draw_tokens(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(FIRST_ID, vocab_size, num_tokens).tolist()
    return drawn


def without_admission(batch: ScheduledBatch) -> ScheduledBatch:
    """The same step of rows that are there."""
    return ScheduledBatch(
        step=batch.step,
        rows=batch.rows,
        num_computed_tokens=batch.num_computed_tokens,
        num_scheduled_tokens=batch.num_scheduled_tokens,
        num_tokens=batch.num_tokens,
    )
