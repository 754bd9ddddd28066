"""Executes scheduled batches on this rank: tables -> tensors -> forward pass -> sampled tokens.

It owns the model, the cache and the row table; it decides nothing about requests. A step has two halves: ``start``
gives the device its work, ``finish`` waits for the tokens. Another step may be started between the two: what the host
does not know, it takes from the device. Invariant: after ``finish`` the row table knows every token that was returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from argosy.cache.mla_kv_cache import MLAKVCache
from argosy.distributed.ep_types import SINGLE_RANK_PLAN, ExchangeOf, ExchangePlan, exchange_nothing
from argosy.distributed.recordings import RecordingKey
from argosy.kernels import RotaryTable
from argosy.kernels.compilations import CompilationCounter, NoCompilations
from argosy.layers.forward_batch import ForwardBatch
from argosy.messages import ScheduledBatch, StepOutput, TokenLogprobs
from argosy.models.deepseek.model import DeepseekV32Model
from argosy.platforms import HostCopy, Platform
from argosy.runner.batch_builder import BatchBuilder, BuiltBatch
from argosy.runner.graph_runner import GraphRunner
from argosy.runner.logprobs import SampledLogprobs
from argosy.runner.prompt_logprobs import PendingPromptLogprobs, PromptLogprobs
from argosy.runner.row_table import RowTable
from argosy.runner.sampler import Sampler


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """The sampled tokens of a step, on their way to the host."""

    sampled: np.ndarray  # entries of the plan, ascending
    rows: np.ndarray  # of the row table, parallel to them
    positions: np.ndarray  # of the tokens in their rows
    token_ids: HostCopy
    logprobs: SampledLogprobs | None
    logprob_copies: tuple[HostCopy, HostCopy] | None  # of its ids and values
    failures: dict[int, str]  # of the sampled rows, those whose request cannot go on


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that the device has been given, between ``start`` and ``finish``."""

    num_rows: int  # of the plan
    tokens: PendingTokens | None  # None: nothing is sampled
    prompt_logprobs: PendingPromptLogprobs | None = None  # None: nobody asked


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
        platform: Platform,
        device: torch.device,
        compilations: CompilationCounter | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.rotary = rotary
        self.graphs: GraphRunner | None = None  # recordings of decode steps, made once the runner is there
        self.compilations = compilations or NoCompilations()  # of kernels, since the first request could come
        self._sampler = sampler
        self._table = row_table
        self._eos_token_ids = tuple(eos_token_ids)
        self._platform = platform
        self._builder = BatchBuilder(row_table, rotary, device)
        self._prompt_logprobs = PromptLogprobs(
            row_table, num_valid_tokens=sampler.num_valid_tokens, platform=platform, device=device
        )
        self._last_tokens: PendingTokens | None = None  # of the step that was started last

    @property
    def num_replays(self) -> int:
        """Steps that recordings took."""
        return 0 if self.graphs is None else self.graphs.num_replays

    def execute(
        self,
        batch: ScheduledBatch,
        exchange: ExchangePlan = SINGLE_RANK_PLAN,
        recording: RecordingKey | None = None,
    ) -> StepOutput:
        """One step alone: ``start`` and ``finish``."""
        return self.finish(self.start(batch, exchange, recording))

    def choose_recording(self, batch: ScheduledBatch) -> RecordingKey | None:
        """For ``start``, on a rank that is alone: several agree."""
        return None if self.graphs is None else self.graphs.table.choose(batch.num_tokens, batch.decode_length)

    @torch.inference_mode()
    def start(
        self,
        batch: ScheduledBatch,
        exchange: ExchangePlan = SINGLE_RANK_PLAN,
        recording: RecordingKey | None = None,
    ) -> StepInFlight:
        """Give the device a step, to be replayed if there is a ``recording`` for it. At most one other may be in
        flight. Collective over the replica and, with ``execute_dummy``, over ep.

        Every rank of the replica gets the same plan and samples the same tokens.
        """
        self._table.apply(batch)
        for request in batch.admitted:
            self._sampler.admit(request.row, request, self._eos_token_ids)
            self._prompt_logprobs.admit(request)
        built = self._builder.build(batch, exchange)
        hidden_states, num_tokens = self._forward(built.forward, recording)

        def compute_logits(rows: torch.Tensor) -> torch.Tensor:
            return self.model.compute_logits(self.model.take_rows(hidden_states, rows, num_tokens))

        prompt_logprobs = self._prompt_logprobs.start(batch, compute_logits)
        tokens = None
        if built.sampled.size:
            logits = compute_logits(built.forward.logits_indices)
            if self._sampler.has_grammar(built.sampled_rows):
                self._learn_last_tokens(built.sampled_rows)
            tokens = self._sample(built, logits)
        self._last_tokens = tokens
        return StepInFlight(len(batch.rows), tokens, prompt_logprobs)

    def finish(self, step: StepInFlight) -> StepOutput:
        """What the step made. Steps are finished in the order in which they were started. NOTE(sync): waits for it."""
        tokens = step.tokens
        prompt_logprobs = {} if step.prompt_logprobs is None else step.prompt_logprobs.wait()
        if tokens is None:
            return StepOutput(sampled_token_ids=[[]] * step.num_rows, prompt_logprobs=prompt_logprobs)
        token_ids = tokens.token_ids.wait().numpy()
        self._table.learn(tokens.rows, tokens.positions, token_ids)
        logprobs = None
        if tokens.logprobs is not None and tokens.logprob_copies is not None:
            read = tokens.logprobs.read(*(copy.wait() for copy in tokens.logprob_copies))
            logprobs = _spread(step.num_rows, tokens.sampled, [[] if entry is None else [entry] for entry in read])
        sampled_token_ids = token_ids[:, None].tolist()
        if len(tokens.sampled) < step.num_rows:
            sampled_token_ids = _spread(step.num_rows, tokens.sampled, sampled_token_ids)
        failures = {int(tokens.sampled[line]): message for line, message in tokens.failures.items()}
        return StepOutput(
            sampled_token_ids=sampled_token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs, failures=failures
        )

    @torch.inference_mode()
    def execute_dummy(self, exchange: ExchangePlan, recording: RecordingKey | None = None) -> None:
        """Takes part in the others' step with one token of nobody. Collective as ``start``."""
        self._forward(self._builder.build_dummy(exchange), recording)

    @torch.inference_mode()
    def try_graphs(self, exchange_of: ExchangeOf = exchange_nothing) -> None:
        """Replays the smallest recording, if there are any: filling its inputs takes a kernel too. Writes no cache
        slot. Collective as the recordings."""
        if self.graphs is None:
            return
        key = self.graphs.table.keys()[-1]
        self.graphs.run(self._builder.build_dummy(exchange_of(key.size)), key)
        self.graphs.num_replays = 0  # that was no step

    def _forward(self, batch: ForwardBatch, recording: RecordingKey | None) -> tuple[torch.Tensor, int]:
        """This rank's slice of the hidden states, and of how many tokens it is the slice."""
        if recording is None:
            return self.model(batch, self.cache), batch.num_tokens
        assert self.graphs is not None, f"{recording} was agreed on, and this rank has no recordings"
        return self.graphs.run(batch, recording), recording.size

    def _learn_last_tokens(self, rows: np.ndarray) -> None:
        """What the step in flight sampled, before ``finish`` says it: a grammar must know the token before.

        NOTE(sync): waits for that step. The device goes on meanwhile: this step's forward pass is in its queue already,
        and the masks are made while it runs.
        """
        tokens = self._last_tokens
        if tokens is not None and (self._table.num_known_tokens[rows] < self._table.num_tokens[rows]).any():
            self._table.learn(tokens.rows, tokens.positions, tokens.token_ids.wait().numpy())

    def _sample(self, built: BuiltBatch, logits: torch.Tensor) -> PendingTokens:
        last_token_ids = self._builder.last_token_ids
        sampled = self._sampler.sample(logits, built.sampled_rows, self._table, last_token_ids)
        last_token_ids[built.device_rows] = sampled.token_ids
        copy, logprobs = self._platform.start_copy_to_host, sampled.logprobs
        return PendingTokens(
            sampled=built.sampled,
            rows=built.sampled_rows,
            positions=self._table.count_sampled(built.sampled_rows),
            token_ids=copy(sampled.token_ids),
            logprobs=logprobs,
            logprob_copies=None if logprobs is None else (copy(logprobs.ids), copy(logprobs.values)),
            failures=sampled.failures,
        )


def _spread(
    num_rows: int, where: np.ndarray, values: list[list[int]] | list[list[TokenLogprobs]]
) -> list[list[int]] | list[list[TokenLogprobs]]:
    """Put ``values`` at the entries ``where`` of a list of ``num_rows`` empty lists."""
    spread: list = [[] for _ in range(num_rows)]
    for entry, value in zip(where, values, strict=True):
        spread[entry] = value
    return spread
