"""The grammars of the requests that run, by row: how far each has come, and which tokens it allows next.

Every rank of a replica has its own table; all see the same tokens, so all make the same masks. It samples nothing.
A row's place in its grammar follows from the tokens of the row alone, so preemption, recomputation and requests that
go on behind another engine's tokens need nothing more. Invariant: a mask always allows a token.

Shape letters: M rows with a grammar, W words of a mask.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from argosy.grammar.compiler import WORD_BITS, GrammarCompiler, Vocabulary, fill_mask, shorten_error
from argosy.sampling_params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_KEPT_GRAMMARS = 128


class KnownTokens(Protocol):
    """The tokens of every row; all of those read here are known."""

    @property
    def token_ids(self) -> np.ndarray: ...  # [max_num_seqs, max length] int32: prompt, then output

    @property
    def num_tokens(self) -> np.ndarray: ...  # [max_num_seqs]

    @property
    def num_prompt_tokens(self) -> np.ndarray: ...  # [max_num_seqs]


@dataclass(frozen=True, slots=True)
class GrammarMasks:
    """Which tokens come next."""

    words: np.ndarray  # [M, W] int32: bit i of word w stands for token 32 w + i
    failures: dict[int, str]  # of the M rows, those that cannot go on, and why; they may only end


@dataclass(slots=True)
class _Place:
    """How far one request has come."""

    structured: StructuredOutputsParams
    ignore_eos: bool
    min_tokens: int
    stop_ids: np.ndarray  # that end the request, end-of-sequence included unless it is ignored
    matcher: "LLMatcher | None" = None  # None: the grammar has not begun, or failed
    failure: str | None = None
    has_begun: bool = False
    num_read: int = 0  # output tokens
    end_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class GrammarTable:
    """``load_vocabulary`` is called by the first request with a grammar."""

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        self._load_vocabulary = load_vocabulary
        self._compiler: GrammarCompiler | None = None
        self._places: dict[int, _Place] = {}
        self._kept: OrderedDict[StructuredOutputsParams, LLMatcher | str] = OrderedDict()  # or why it failed

    def admit(self, row: int, params: SamplingParams, stop_ids: np.ndarray) -> None:
        """A request with a grammar (re)starts in ``row``. ``stop_ids``: [any] int64, all that may end it."""
        structured = params.structured_outputs
        assert structured is not None
        place = _Place(structured, params.ignore_eos, params.min_tokens, stop_ids)
        place.end_ids = np.array(self._get_compiler().eos_token_ids, dtype=np.int64)
        self._places[row] = place
        if structured.starts_after_token_id is None:
            self._begin(place)

    def forget(self, row: int) -> None:
        """The row belongs to a request without a grammar now."""
        self._places.pop(row, None)

    def fill(self, rows: np.ndarray, history: KnownTokens) -> GrammarMasks:
        """The masks of ``rows`` behind all their tokens."""
        words = np.zeros((len(rows), self._get_compiler().num_words), dtype=np.int32)
        failures: dict[int, str] = {}
        for i, row in enumerate(rows.tolist()):
            place = self._places[row]
            start, end = int(history.num_prompt_tokens[row]), int(history.num_tokens[row])
            self._read(place, history.token_ids[row, start + place.num_read : end].tolist())
            self._fill_row(place, words[i], end - start)
            if place.failure is not None:
                failures[i] = place.failure
        return GrammarMasks(words, failures)

    def _get_compiler(self) -> GrammarCompiler:
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._load_vocabulary())
        return self._compiler

    def _begin(self, place: _Place) -> None:
        place.has_begun = True
        kept = self._kept.get(place.structured)
        if kept is None:
            try:
                kept = self._get_compiler().compile(place.structured)
            except ValueError as error:
                kept = f"the grammar cannot be compiled: {error}"
            self._keep(place.structured, kept)
        self._kept.move_to_end(place.structured)
        if isinstance(kept, str):
            place.failure = kept
        else:
            place.matcher = kept.deep_copy()

    def _keep(self, structured: StructuredOutputsParams, what: "LLMatcher | str") -> None:
        self._kept[structured] = what
        while len(self._kept) > MAX_KEPT_GRAMMARS:
            self._kept.popitem(last=False)

    def _read(self, place: _Place, token_ids: list[int]) -> None:
        place.num_read += len(token_ids)
        if not place.has_begun:
            start_id = place.structured.starts_after_token_id
            if start_id not in token_ids:
                return
            token_ids = token_ids[token_ids.index(start_id) + 1 :]
            self._begin(place)
        matcher = place.matcher
        # With a step in flight this may come behind the end of the request, where nothing matches any more.
        if token_ids and matcher is not None and not matcher.is_stopped() and not matcher.consume_tokens(token_ids):
            place.failure = f"the grammar cannot be followed: {shorten_error(matcher.get_error())}"

    def _fill_row(self, place: _Place, words: np.ndarray, num_output_tokens: int) -> None:
        matcher = place.matcher
        if not place.has_begun:
            words[:] = -1
            _clear(words, place.end_ids)  # a grammar was promised, so the end cannot come before it has begun
        elif place.failure is None and matcher is not None and not matcher.is_stopped():
            fill_mask(matcher, words)
            if matcher.is_error():
                place.failure = f"the grammar cannot be followed: {shorten_error(matcher.get_error())}"
                self._keep(place.structured, place.failure)  # the next request would only find the same
        if place.failure is not None or (place.has_begun and matcher is not None and matcher.is_stopped()):
            words[:] = 0
            _set(words, place.end_ids)
            return
        self._hold_back_ends(place, words, num_output_tokens)

    def _hold_back_ends(self, place: _Place, words: np.ndarray, num_output_tokens: int) -> None:
        """``min_tokens`` and ``ignore_eos``, as long as the grammar has anything else to say."""
        held = place.end_ids if place.ignore_eos else place.end_ids[:0]
        if num_output_tokens < place.min_tokens:
            held = np.concatenate((held, place.stop_ids))
        if held.size:
            left = words.copy()
            _clear(left, held)
            if left.any():
                words[:] = left


def _clear(words: np.ndarray, token_ids: np.ndarray) -> None:
    np.bitwise_and.at(words, token_ids // WORD_BITS, ~_bits(token_ids))


def _set(words: np.ndarray, token_ids: np.ndarray) -> None:
    np.bitwise_or.at(words, token_ids // WORD_BITS, _bits(token_ids))


def _bits(token_ids: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint32(1), (token_ids % WORD_BITS).astype(np.uint32)).view(np.int32)
