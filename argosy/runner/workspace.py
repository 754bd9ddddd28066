"""What a step takes beside weights and cache, measured by running the largest one before the cache is allocated.

It runs on a cache of one block, which every position shares: what is computed means nothing, and takes the memory that
a real step takes. Invariant: nothing that is allocated here outlives the call.

Shape letters: T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from argosy.cache.cache_format import CacheFormat
from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.distributed.ep_types import ExchangeOf, exchange_nothing
from argosy.kernels import RotaryTable
from argosy.messages import AdmittedRequest, ScheduledBatch
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.platforms import Platform
from argosy.runner.batch_builder import BatchBuilder
from argosy.runner.row_table import RowTable
from argosy.sampling_params import SamplingParams

_STRIDE = 7919  # a prime: neighbouring tokens are no neighbours in the vocabulary
# Index scores are made in pieces of a fixed size, so a longer context takes more time and no more memory.
LONGEST_CONTEXT = 65536


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """The largest steps of an engine."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int


@torch.inference_mode()
def measure_workspace(
    model: DeepseekV32Model,
    cache_format: CacheFormat,
    rotary: RotaryTable,
    sizes: StepSizes,
    platform: Platform,
    *,
    num_layers: int,
    exchange_of: ExchangeOf = exchange_nothing,
) -> int | None:
    """Bytes at the peak of a prefill of ``max_num_batched_tokens`` behind a long context, with logits to sample for
    ``max_num_seqs`` requests; None where the platform does not count. Collective over world: all ranks run it, each
    replica with tokens of its own, which are alike and so meet at the same few experts: the most that can come to them.
    """
    platform.reset_peak()
    before = platform.peak_bytes()
    if before is None:
        return None
    device = rotary.cos.device
    cache = MLAKVCache(cache_format, num_layers=num_layers, num_blocks=1, block_size=sizes.block_size, device=device)
    batch = plan_largest_prefill(sizes)
    table = RowTable(
        max_num_seqs=len(batch.rows), max_model_len=sizes.max_model_len, block_size=sizes.block_size
    )  # all zeros: every position lies in block 0
    table.apply(batch)
    exchange = exchange_of(batch.num_tokens)
    hidden_states = model(BatchBuilder(table, rotary, device).build(batch, exchange).forward, cache)
    rows = torch.zeros(sizes.max_num_seqs, dtype=torch.int64, device=device)
    logits = model.compute_logits(model.take_rows(hidden_states, rows, batch.num_tokens))
    logits.softmax(dim=1)  # sampling takes as much again
    peak = platform.peak_bytes()
    assert peak is not None
    return peak - before


def plan_largest_prefill(sizes: StepSizes) -> ScheduledBatch:
    """As many tokens as a step may compute, in as few requests as can hold them, behind as long a context."""
    longest = min(sizes.max_model_len, max(LONGEST_CONTEXT, sizes.max_num_batched_tokens))
    starts = range(0, sizes.max_num_batched_tokens, longest)
    num_tokens = [min(longest, sizes.max_num_batched_tokens - start) for start in starts][: sizes.max_num_seqs]
    return plan_trial([(longest - scheduled, scheduled) for scheduled in num_tokens])


def plan_trial(requests: Sequence[tuple[int, int]], num_token_ids: int = 1) -> ScheduledBatch:
    """A step of requests that nobody made: computed and scheduled tokens of each, decodes first. All are sampled, and
    have no blocks. ``num_token_ids``: so many different tokens are computed, so that they go to different experts."""
    num_computed, num_scheduled = [computed for computed, _ in requests], [scheduled for _, scheduled in requests]
    admitted = [
        AdmittedRequest(
            row=row,
            request_id=f"trial-{row}",
            token_ids=[0] * computed + [(row + i) * _STRIDE % num_token_ids for i in range(scheduled)],
            num_prompt_tokens=computed + scheduled,
            num_computed_tokens=computed,
            block_ids=[],
            sampling_params=SamplingParams(),
        )
        for row, (computed, scheduled) in enumerate(requests)
    ]
    return ScheduledBatch(
        step=0,
        rows=list(range(len(requests))),
        num_computed_tokens=num_computed,
        num_scheduled_tokens=num_scheduled,
        admitted=admitted,
        num_tokens=sum(num_scheduled),
    )
