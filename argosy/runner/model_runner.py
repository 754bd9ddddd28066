"""Executes a scheduled batch on this rank: tables -> tensors -> forward pass -> sampled tokens.

It owns the model, the cache and the row table; it decides nothing about requests. Invariant: after ``execute`` the row
table holds every token that was returned.
"""

from collections.abc import Sequence

import numpy as np
import torch

from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.distributed.ep_types import SINGLE_RANK_PLAN, ExchangePlan
from argosy.kernels import RotaryTable
from argosy.messages import ScheduledBatch, StepOutput, TokenLogprobs
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.runner.batch_builder import BatchBuilder, BuiltBatch
from argosy.runner.row_table import RowTable
from argosy.runner.sampler import Sampler


class ModelRunner:
    """One rank's execution."""

    def __init__(
        self,
        *,
        model: DeepseekV32Model,
        cache: MLAKVCache,
        rotary: RotaryTable,
        sampler: Sampler,
        row_table: RowTable,
        eos_token_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self.model = model
        self.cache = cache
        self.rotary = rotary
        self._sampler = sampler
        self._table = row_table
        self._eos_token_ids = tuple(eos_token_ids)
        self._builder = BatchBuilder(row_table, rotary, device)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch, exchange: ExchangePlan = SINGLE_RANK_PLAN) -> StepOutput:
        """One step. Collective over the replica and, with ``execute_dummy``, over ep.

        Every rank of the replica gets the same plan and returns the same tokens. NOTE(sync): ends with the sampled ids
        on the host.
        """
        self._table.apply(batch)
        for request in batch.admitted:
            self._sampler.admit(request.row, request, self._eos_token_ids)
        built = self._builder.build(batch, exchange)
        hidden_states = self.model(built.forward, self.cache)
        if not built.sampled.size:
            return StepOutput(sampled_token_ids=[[]] * len(batch.rows))
        logits = self.model.compute_logits(self.model.take_rows(hidden_states, built.forward))
        return self._sample(batch, built, logits)

    @torch.inference_mode()
    def execute_dummy(self, exchange: ExchangePlan) -> None:
        """Takes part in the others' step with one token of nobody. Collective as ``execute``."""
        self.model(self._builder.build_dummy(exchange), self.cache)

    def _sample(self, batch: ScheduledBatch, built: BuiltBatch, logits: torch.Tensor) -> StepOutput:
        sampled = self._sampler.sample(logits, built.sampled_rows, self._table)
        token_ids = sampled.token_ids.cpu().numpy()  # NOTE(sync): the step's result
        self._table.append_one_token_each(built.sampled_rows, token_ids)
        logprobs = None
        if sampled.logprobs is not None:
            logprobs = _spread(len(batch.rows), built.sampled, [[] if p is None else [p] for p in sampled.logprobs])
        if len(built.sampled) == len(batch.rows):
            return StepOutput(sampled_token_ids=token_ids[:, None].tolist(), logprobs=logprobs)
        spread = _spread(len(batch.rows), built.sampled, token_ids[:, None].tolist())
        return StepOutput(sampled_token_ids=spread, logprobs=logprobs)


def _spread(
    num_rows: int, where: np.ndarray, values: list[list[int]] | list[list[TokenLogprobs]]
) -> list[list[int]] | list[list[TokenLogprobs]]:
    """Put ``values`` at the entries ``where`` of a list of ``num_rows`` empty lists."""
    spread: list = [[] for _ in range(num_rows)]
    for entry, value in zip(where, values, strict=True):
        spread[entry] = value
    return spread
