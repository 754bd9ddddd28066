"""From what a user asks of an output to an llguidance matcher over a tokenizer's tokens, within fixed limits.

llguidance is imported by the first grammar, so that whoever uses none pays nothing for it. Nothing here bounds time:
the limits count work, and compiling a hostile grammar may still take seconds, so a server first tries every grammar in
a process that it can kill (``server/grammar_checker.py``). Invariant: equal settings give matchers that allow equal
tokens, in every process.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from argosy.sampling_params import JSON_WHITESPACE, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

WORD_BITS = 32  # of a mask; bit i of word w is token 32 w + i
_NUM_TRIAL_TOKENS = 16
_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that grammars are followed in."""

    token_bytes: Sequence[bytes]  # by id
    special_token_ids: Sequence[int]  # stand for no text, so no grammar allows them
    eos_token_ids: tuple[int, ...]
    encode: Callable[[str], list[int]]


class GrammarCompiler:
    """Makes matchers. Building it takes about a second for 130,000 tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.num_tokens = len(vocabulary.token_bytes)
        self.eos_token_ids = tuple(each for each in vocabulary.eos_token_ids if each < self.num_tokens)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_TokenizerView(vocabulary)), n_vocab=self.num_tokens, eos_token=list(self.eos_token_ids)
        )
        self._limits = _build_limits()

    @property
    def num_words(self) -> int:
        """Of a mask."""
        return -(-self.num_tokens // WORD_BITS)

    def compile(self, params: StructuredOutputsParams) -> "LLMatcher":
        """A matcher at the beginning of the output.

        Raises:
            ValueError: not a grammar, or one beyond the limits.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, write_grammar(params), log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ValueError(shorten_error(matcher.get_error()))
        return matcher

    def check(self, params: StructuredOutputsParams) -> None:
        """Compile it, and follow it for a few tokens: some grammars show what they cost only then.

        Raises:
            ValueError: not a grammar, one beyond the limits, or one that matches nothing.
        """
        matcher = self.compile(params)
        mask = np.zeros(self.num_words, dtype=np.int32)
        chooser = random.Random(0)
        for _ in range(_NUM_TRIAL_TOKENS):
            if matcher.is_stopped():
                break
            fill_mask(matcher, mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")) if _is_well(matcher) else []
            if not len(allowed):
                break
            matcher.consume_token(int(chooser.choice(allowed)))
        if matcher.is_error():
            raise ValueError(shorten_error(matcher.get_error()))
        if not mask.any():
            raise ValueError("the grammar matches no text")


def write_grammar(params: StructuredOutputsParams) -> str:
    """In llguidance's own form.

    Raises:
        ValueError: text that is no JSON schema.
    """
    from llguidance import LLMatcher

    if params.json is not None or params.json_object:
        schema = '{"type": "object"}' if params.json is None else str(params.json)
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_WHITESPACE})
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # Capital letters make it one lexeme, which costs less than as many rules.
        return f"start: CHOICE\nCHOICE: {' | '.join(map(write_literal, params.choice))}\n"
    assert params.grammar is not None
    return LLMatcher.grammar_from_lark(params.grammar)


def write_literal(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def fill_mask(matcher: "LLMatcher", words: np.ndarray) -> None:
    """``words: [num_words]`` int32: the tokens that may come next. The matcher may be in error after it."""
    assert words.dtype == np.int32 and words.flags["C_CONTIGUOUS"]
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)


def shorten_error(message: str) -> str:
    """llguidance's words without what follows them: the state of its parser."""
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= _MAX_ERROR_CHARS else f"{text[:_MAX_ERROR_CHARS]}..."


def _is_well(matcher: "LLMatcher") -> bool:
    return not matcher.is_error()


def _build_limits() -> "LLParserLimits":
    """Tighter than llguidance's: a step waits for its masks, and every request keeps its lexer's states in memory."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=100_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=25_000,  # at 1 to 2 kB
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class _TokenizerView:
    """What llguidance wants to see of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None
        self.tokens = list(vocabulary.token_bytes)
        self.special_token_ids = sorted({*vocabulary.special_token_ids, *vocabulary.eos_token_ids})
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode(errors="replace"))
