"""Turns logits into tokens, each row by its own request's settings.

Settings live in host tables indexed by row, so a step costs no loop over requests; a batch in which every row is greedy
and plain is one argmax. It keeps no random state (``random_stream.py``) and no token ids (see ``TokenHistory``).
Order of the steps: logit bias, min_tokens mask, penalties, grammar mask, temperature, min-p, top-k, top-p, draw.
Invariant: the token of a row depends on its logits, its settings, its key and its history alone.

Shape letters: N rows to sample, M rows that need a step, V valid tokens.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from argosy.grammar.grammar_table import GrammarTable, KnownTokens
from argosy.messages import AdmittedRequest
from argosy.runner import sampling_ops
from argosy.runner.logprobs import SampledLogprobs
from argosy.runner.random_stream import key_from_request, key_from_seed, uniforms
from argosy.runner.transfer import send
from argosy.sampling_params import SamplingParams

# Below this, float32 cannot tell a temperature from 0: the likeliest token has all the mass either way.
_MIN_TEMPERATURE = 1e-6
_MIN_REPETITION = 1e-30  # a logit divided by it is still finite
_MAX_DRAW_ELEMENTS = 2**23  # rows times tokens that are filtered at once: bounds temporary memory to about 0.3 GB


class TokenHistory(KnownTokens, Protocol):
    """The caller's host tables, indexed by row; read only for rows that need them."""

    @property
    def num_known_tokens(self) -> np.ndarray: ...  # [max_num_seqs]: num_tokens, or 1 less where the last is missing


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per sampled row."""

    token_ids: torch.Tensor  # [N] int64, on the device of the logits
    logprobs: SampledLogprobs | None  # on the device too; None if no row asked
    failures: dict[int, str] = field(default_factory=dict)  # line -> why its request cannot go on; its token is an end


class _Needs(enum.IntFlag):
    """What a row needs beyond argmax."""

    DRAW = 1
    TOP = 2
    MIN_P = 4
    BIAS = 8
    MIN_TOKENS = 16
    PENALTIES = 32
    LOGPROBS = 64
    GRAMMAR = 128


class Sampler:
    """The sampler of one rank.

    Args:
        vocab_size: width of the logits.
        num_valid_tokens: entries of the tokenizer; logits from there on are padding and can never be chosen.
        engine_seed: seeds requests that bring no seed.
        grammars: of the rows that have one; None refuses such requests, for tests.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_valid_tokens: int,
        max_num_seqs: int,
        device: torch.device,
        engine_seed: int,
        grammars: GrammarTable | None = None,
    ) -> None:
        if not 1 <= num_valid_tokens <= vocab_size:
            raise ValueError(
                f"the tokenizer has {num_valid_tokens} entries, but the model's vocab_size is {vocab_size}; "
                "tokenizer and model must belong together"
            )
        self.num_valid_tokens = num_valid_tokens
        self._vocab_size = vocab_size
        self._device = device
        self._engine_seed = engine_seed
        self._grammars = grammars
        self._needs = np.zeros(max_num_seqs, dtype=np.uint8)
        self._key = np.zeros(max_num_seqs, dtype=np.uint64)
        self._temperature = np.ones(max_num_seqs, dtype=np.float32)
        self._top_k = np.ones(max_num_seqs, dtype=np.int64)
        self._top_p = np.ones(max_num_seqs, dtype=np.float64)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self._repetition = np.ones(max_num_seqs, dtype=np.float32)
        self._frequency = np.zeros(max_num_seqs, dtype=np.float32)
        self._presence = np.zeros(max_num_seqs, dtype=np.float32)
        self._min_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_logprobs = np.zeros(max_num_seqs, dtype=np.int64)
        no_ids, no_values = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        self._bias_ids = [no_ids] * max_num_seqs
        self._bias_values = [no_values] * max_num_seqs
        self._stop_ids = [no_ids] * max_num_seqs

    def admit(self, row: int, request: AdmittedRequest, eos_token_ids: Sequence[int]) -> None:
        """Take over the settings of the request that (re)starts in ``row``, in place of the last one's."""
        params = request.sampling_params
        self._set_key(row, request)
        self._temperature[row] = max(params.temperature, _MIN_TEMPERATURE)
        self._top_k[row] = min(params.top_k if params.top_k > 0 else self.num_valid_tokens, self.num_valid_tokens)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._repetition[row] = max(params.repetition_penalty, _MIN_REPETITION)
        self._frequency[row] = params.frequency_penalty
        self._presence[row] = params.presence_penalty
        self._min_tokens[row] = params.min_tokens
        self._num_logprobs[row] = params.logprobs or 0
        bias = params.logit_bias or {}
        self._bias_ids[row] = np.fromiter(bias.keys(), dtype=np.int64)
        self._bias_values[row] = np.fromiter(bias.values(), dtype=np.float32)
        assert (self._bias_ids[row] < self.num_valid_tokens).all(), f"logit_bias of {request.request_id} is unchecked"
        stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        # A stop id beyond the tokenizer is never sampled, so it needs no mask.
        self._stop_ids[row] = np.array([i for i in sorted(stop_ids) if i < self.num_valid_tokens], dtype=np.int64)
        self._admit_grammar(row, request)
        self._needs[row] = _find_needs(params, cuts_top_k=bool(self._top_k[row] < self.num_valid_tokens))

    def sample(
        self, logits: torch.Tensor, rows: np.ndarray, history: TokenHistory, last_token_ids: torch.Tensor | None = None
    ) -> SampledTokens:
        """One token for every line of ``logits``.

        Args:
            logits: [N, vocab_size], any float dtype; not changed.
            rows: [N] integers, the row of each line.
            history: the tokens of each row *before* this step; their number is the position in the random stream.
            last_token_ids: [max_num_seqs] int64 on the device: the last token of rows of which ``history`` lacks it.

        Host arrays are copied to the device; nothing is read back.
        """
        assert logits.shape == (len(rows), self._vocab_size), (logits.shape, len(rows), self._vocab_size)
        scores = logits[:, : self.num_valid_tokens]  # the padded rows are cut off rather than masked: no copy
        line_needs = self._needs[rows]
        needs = int(np.bitwise_or.reduce(line_needs, initial=0))
        if not needs:
            return SampledTokens(sampling_ops.argmax(scores), None)
        raw = scores.float()
        adjusted = self._adjust(raw, rows, line_needs, history, last_token_ids)
        failures: dict[int, str] = {}
        if needs & _Needs.GRAMMAR:
            adjusted, failures = self._mask_by_grammar(adjusted, raw, rows, line_needs, history)
        token_ids = sampling_ops.argmax(adjusted)
        if needs & _Needs.DRAW:
            self._draw_into(token_ids, adjusted, rows, line_needs, history)
        logprobs = self._logprobs(raw, token_ids, rows, line_needs) if needs & _Needs.LOGPROBS else None
        return SampledTokens(token_ids, logprobs, failures)

    def has_grammar(self, rows: np.ndarray) -> bool:
        """Whether some of them have one: then ``sample`` must know all their tokens."""
        return bool((self._needs[rows] & _Needs.GRAMMAR).any())

    def _admit_grammar(self, row: int, request: AdmittedRequest) -> None:
        if request.sampling_params.structured_outputs is not None:
            assert self._grammars is not None, "this sampler was built without grammars"
            self._grammars.admit(row, request.sampling_params, self._stop_ids[row])
        elif self._grammars is not None:
            self._grammars.forget(row)

    def _mask_by_grammar(
        self,
        scores: torch.Tensor,
        raw: torch.Tensor,
        rows: np.ndarray,
        line_needs: np.ndarray,
        history: TokenHistory,
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """``scores`` with what the grammars forbid masked, on a copy where it is ``raw``; and which lines failed."""
        assert self._grammars is not None
        lines = np.flatnonzero(line_needs & _Needs.GRAMMAR)
        grammar_rows = rows[lines]
        assert (history.num_known_tokens[grammar_rows] == history.num_tokens[grammar_rows]).all(), "unknown tokens"
        masks = self._grammars.fill(grammar_rows, history)
        if scores is raw:
            scores = raw.clone()
        index = self._send(lines)
        part = scores[index]
        sampling_ops.mask_outside_words(part, self._send(masks.words))
        scores[index] = part
        return scores, {int(lines[i]): message for i, message in masks.failures.items()}

    def _set_key(self, row: int, request: AdmittedRequest) -> None:
        """Kept with the request, not the row: a request that was preempted goes on in the same stream."""
        seed = request.sampling_params.seed
        self._key[row] = (
            key_from_request(self._engine_seed, request.request_id) if seed is None else key_from_seed(seed)
        )

    def _adjust(
        self,
        raw: torch.Tensor,
        rows: np.ndarray,
        line_needs: np.ndarray,
        history: TokenHistory,
        last_token_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Bias, min_tokens mask and penalties on a copy; ``raw`` itself if no row needs them."""
        num_output_tokens = history.num_tokens[rows] - history.num_prompt_tokens[rows]
        biased = np.flatnonzero(line_needs & _Needs.BIAS)
        # Where there is a grammar, it is the one to hold back ends.
        is_short = (line_needs & _Needs.MIN_TOKENS > 0) & (line_needs & _Needs.GRAMMAR == 0)
        too_short = np.flatnonzero(is_short & (num_output_tokens < self._min_tokens[rows]))
        penalised = np.flatnonzero(line_needs & _Needs.PENALTIES)
        if not (biased.size or too_short.size or penalised.size):
            return raw
        scores = raw.clone()
        if biased.size:
            lines, token_ids = _flatten(biased, [self._bias_ids[row] for row in rows[biased]])
            values = np.concatenate([self._bias_values[row] for row in rows[biased]])
            scores[self._send(lines), self._send(token_ids)] += self._send(values)
        if too_short.size:
            lines, token_ids = _flatten(too_short, [self._stop_ids[row] for row in rows[too_short]])
            scores[self._send(lines), self._send(token_ids)] = -torch.inf
        if penalised.size:
            lines_index = self._send(penalised)
            scores[lines_index] = self._penalize(scores[lines_index], rows[penalised], history, last_token_ids)
        return scores

    def _penalize(
        self, scores: torch.Tensor, rows: np.ndarray, history: TokenHistory, last_token_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Counts are made anew from the history, O(its length): exact after any preemption, with no state to keep."""
        num_tokens, num_prompt_tokens = history.num_tokens[rows, None], history.num_prompt_tokens[rows, None]
        position = np.arange(num_tokens.max())
        padding = self.num_valid_tokens
        token_ids = np.minimum(history.token_ids[rows, : len(position)].astype(np.int64), padding)  # [M, longest]
        token_ids[position >= num_tokens] = padding
        output_ids = np.where(position >= num_prompt_tokens, token_ids, padding)
        histories = self._send(np.stack((token_ids, output_ids)))  # [2, M, longest]
        late = np.flatnonzero(history.num_known_tokens[rows] < num_tokens[:, 0])
        if late.size:
            assert last_token_ids is not None
            lines, last, late_rows = self._send(np.stack((late, num_tokens[late, 0] - 1, rows[late])))
            histories[:, lines, last] = last_token_ids[late_rows]  # an output token, so it counts in both
        return sampling_ops.penalize(
            scores,
            sampling_ops.count_tokens(histories[0], padding),
            sampling_ops.count_tokens(histories[1], padding),
            repetition=self._send(self._repetition[rows, None]),
            frequency=self._send(self._frequency[rows, None]),
            presence=self._send(self._presence[rows, None]),
        )

    def _draw_into(
        self,
        token_ids: torch.Tensor,
        scores: torch.Tensor,
        rows: np.ndarray,
        line_needs: np.ndarray,
        history: TokenHistory,
    ) -> None:
        lines = np.flatnonzero(line_needs & _Needs.DRAW)
        chunk_size = max(1, _MAX_DRAW_ELEMENTS // self.num_valid_tokens)
        for start in range(0, len(lines), chunk_size):
            chunk = lines[start : start + chunk_size]
            chunk_rows = rows[chunk]
            num_output_tokens = history.num_tokens[chunk_rows] - history.num_prompt_tokens[chunk_rows]
            index = self._send(chunk)
            scaled = sampling_ops.scale_by_temperature(scores[index], self._send(self._temperature[chunk_rows, None]))
            self._filter(scaled, chunk_rows, line_needs[chunk])
            uniform = self._send(uniforms(self._key[chunk_rows], num_output_tokens)[:, None])
            token_ids[index] = sampling_ops.draw(scaled, uniform)

    def _filter(self, scaled: torch.Tensor, rows: np.ndarray, line_needs: np.ndarray) -> None:
        """min-p, top-k and top-p, in place. With top-p and no top-k a line is sorted whole."""
        if (line_needs & _Needs.MIN_P).any():
            sampling_ops.mask_below_min_p(scaled, self._send(self._min_p[rows, None]))
        filtered = np.flatnonzero(line_needs & _Needs.TOP)
        if filtered.size:
            index, top_k = self._send(filtered), self._top_k[rows[filtered], None]
            part = scaled[index]
            top_p = self._send(self._top_p[rows[filtered], None])
            sampling_ops.mask_outside_top(part, self._send(top_k), top_p, int(top_k.max()))
            scaled[index] = part

    def _logprobs(
        self, raw: torch.Tensor, token_ids: torch.Tensor, rows: np.ndarray, line_needs: np.ndarray
    ) -> SampledLogprobs:
        """Of the model's own distribution, before bias, penalties, grammar and temperature, over the valid tokens."""
        lines = np.flatnonzero(line_needs & _Needs.LOGPROBS)
        num_top = np.minimum(self._num_logprobs[rows[lines]], self.num_valid_tokens)
        index = self._send(lines)
        ids, values = sampling_ops.measure_tokens(raw[index], token_ids[index], int(num_top.max()))
        return SampledLogprobs(num_lines=len(rows), lines=lines, num_top=num_top, ids=ids, values=values)

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return send(array, self._device)


def _find_needs(params: SamplingParams, *, cuts_top_k: bool) -> int:
    is_drawn = not params.is_greedy
    wanted = {
        _Needs.DRAW: is_drawn,
        _Needs.TOP: is_drawn and (cuts_top_k or params.top_p < 1.0),
        _Needs.MIN_P: is_drawn and params.min_p > 0.0,
        _Needs.BIAS: bool(params.logit_bias),
        _Needs.MIN_TOKENS: params.min_tokens > 0,
        _Needs.PENALTIES: params.needs_penalties,
        _Needs.LOGPROBS: params.logprobs is not None,
        _Needs.GRAMMAR: params.structured_outputs is not None,
    }
    return sum(need for need, is_wanted in wanted.items() if is_wanted)


def _flatten(lines: np.ndarray, token_ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(line, token id) pairs of ragged lists, as two arrays."""
    return np.repeat(lines, [len(ids) for ids in token_ids]), np.concatenate(token_ids)
