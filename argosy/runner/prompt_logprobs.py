"""Log probabilities of prompts: which tokens of a step they come from, and their computation in pieces.

The hidden state of a prompt's token tells of the token behind it. It knows no scheduling: a request is admitted with
the first position that is wanted, and every later step of its row goes on from there. Invariant: logits of at most
``MAX_LINES`` tokens exist at once, and a step in which nobody asks costs nothing.

Shape letters: P prompt tokens of a step that are asked about, V valid tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from argosy.messages import AdmittedRequest, ScheduledBatch, TokenLogprobs
from argosy.platforms import HostCopy, Platform
from argosy.runner import sampling_ops
from argosy.runner.logprobs import SampledLogprobs
from argosy.runner.row_table import RowTable
from argosy.runner.transfer import send_together

MAX_LINES = 64  # with 129,280 tokens one copy of their scores is 33 MB, and ranking them takes about nine such

ComputeLogits = Callable[[torch.Tensor], torch.Tensor]  # [N] int64, tokens of the batch -> [N, at least V]


@dataclass(frozen=True, slots=True)
class PendingPromptLogprobs:
    """Of one step, on their way to the host."""

    counts: dict[int, int]  # entry of the plan -> so many tokens, in the order of the lines
    pieces: list[tuple[SampledLogprobs, HostCopy, HostCopy]]  # consecutive lines, and copies of their ids and values

    def wait(self) -> dict[int, list[TokenLogprobs]]:
        """By entry of the plan. NOTE(sync): waits for what made them."""
        lines: list[TokenLogprobs] = []
        for piece, ids, values in self.pieces:
            lines += [each for each in piece.read(ids.wait(), values.wait()) if each is not None]
        result, start = {}, 0
        for entry, count in self.counts.items():
            result[entry] = lines[start : start + count]
            start += count
        return result


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Of the request in a row."""

    first: int  # position of the first token asked about, at least 1
    num_prompt_tokens: int
    num_top: int


class PromptLogprobs:
    """Of one rank. ``num_valid_tokens``: entries of the tokenizer; logits from there on are padding."""

    def __init__(self, row_table: RowTable, *, num_valid_tokens: int, platform: Platform, device: torch.device) -> None:
        self._table = row_table
        self._num_valid_tokens = num_valid_tokens
        self._platform = platform
        self._device = device
        self._wanted: dict[int, _Wanted] = {}  # by row

    def admit(self, request: AdmittedRequest) -> None:
        """The request that (re)starts in its row, in place of the last one."""
        self._wanted.pop(request.row, None)
        if request.first_prompt_logprob:
            num_top = min(request.sampling_params.prompt_logprobs or 0, self._num_valid_tokens)
            self._wanted[request.row] = _Wanted(request.first_prompt_logprob, request.num_prompt_tokens, num_top)

    def start(self, batch: ScheduledBatch, compute_logits: ComputeLogits) -> PendingPromptLogprobs | None:
        """After the forward pass of ``batch``, whose requests were admitted; None if nobody asks.

        ``compute_logits`` is called once a piece, with ascending tokens, and by every rank of the replica alike.
        """
        if not self._wanted:
            return None
        spans = self._find_spans(batch)
        if not spans:
            return None
        tokens = np.concatenate([np.arange(start, start + len(targets)) for start, targets, _ in spans.values()])
        targets = np.concatenate([targets for _, targets, _ in spans.values()])
        num_top = np.repeat([num for *_, num in spans.values()], [len(targets) for _, targets, _ in spans.values()])
        token_index, target_ids = send_together((tokens, targets), self._device)  # [P], [P]
        pieces = []
        for start in range(0, len(tokens), MAX_LINES):
            part = slice(start, start + MAX_LINES)
            logits = compute_logits(token_index[part])
            pieces.append(self._start_piece(logits, target_ids[part], num_top[part]))
        return PendingPromptLogprobs({entry: len(targets) for entry, (_, targets, _) in spans.items()}, pieces)

    def _find_spans(self, batch: ScheduledBatch) -> dict[int, tuple[int, np.ndarray, int]]:
        """Entry of the plan -> first token of the batch, ids of the tokens behind it and those after, and the number of
        alternatives wanted."""
        spans, start = {}, 0
        entries = zip(batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True)
        for entry, (row, num_computed, num_scheduled) in enumerate(entries):
            wanted = self._wanted.get(row)
            if wanted is not None:
                first = max(wanted.first, num_computed + 1)
                stop = min(wanted.num_prompt_tokens, num_computed + num_scheduled + 1)
                if first < stop:
                    targets = self._table.token_ids[row, first:stop].astype(np.int64)
                    spans[entry] = (start + first - 1 - num_computed, targets, wanted.num_top)
                if stop == wanted.num_prompt_tokens:
                    del self._wanted[row]
            start += num_scheduled
        return spans

    def _start_piece(
        self, logits: torch.Tensor, target_ids: torch.Tensor, num_top: np.ndarray
    ) -> tuple[SampledLogprobs, HostCopy, HostCopy]:
        scores = logits[:, : self._num_valid_tokens].float()
        ids, values = sampling_ops.measure_tokens(scores, target_ids, int(num_top.max()))
        lines = np.arange(len(num_top))
        piece = SampledLogprobs(num_lines=len(num_top), lines=lines, num_top=num_top, ids=ids, values=values)
        return piece, self._platform.start_copy_to_host(ids), self._platform.start_copy_to_host(values)
