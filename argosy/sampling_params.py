"""What a user may ask of sampling, validated once.

Plain data: it crosses processes with the request. It knows nothing of the model, so checks against the vocabulary or
the model's length are made where those are known (``engine/generation.py``). Invariant: an instance that exists is
valid.
"""

import json
import math
from dataclasses import dataclass

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_SEED = 2**63 - 1
MAX_GRAMMAR_BYTES = 2**18  # of a schema, regular expression, grammar, or all choices together
# Between the parts of a JSON value: a blank, or a new line with its indentation. A model that may write any number of
# blanks sometimes fills all its tokens with them.
JSON_WHITESPACE = r"( |\n[ \t]{0,20})"
_FORMS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What the output must match; exactly one of the first five, with vLLM's names.

    Whether it can be compiled is found out later (``argosy/grammar``).

    Raises:
        ValueError: naming the field, the value and the rule.
    """

    json: str | dict[str, object] | None = None  # a JSON schema, as an object or as its text; kept as text
    regex: str | None = None  # of the whole output; Rust's syntax
    choice: tuple[str, ...] | None = None  # one of these texts
    grammar: str | None = None  # context-free, in llguidance's dialect of Lark, with a rule "start"
    json_object: bool = False  # any JSON object
    starts_after_token_id: int | None = None  # what comes before the first such token is free: reasoning

    def __post_init__(self) -> None:
        given = [name for name in _FORMS if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"structured_outputs needs exactly one of {', '.join(_FORMS)}; found {found}")
        if isinstance(self.json, dict):
            object.__setattr__(self, "json", _write_json(self.json))
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        value = getattr(self, given[0])
        if given[0] == "choice":
            if not isinstance(value, tuple) or not value or not all(isinstance(each, str) and each for each in value):
                raise ValueError(f"structured_outputs.choice must hold one text or more, none empty, got {value!r:.80}")
            value = "".join(value)
        elif given[0] == "json_object":
            value = "{}" if value is True else None
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"structured_outputs.{given[0]} must be a text that is not empty, got {getattr(self, given[0])!r:.80}"
            )
        num_bytes = len(value.encode(errors="surrogatepass"))
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise ValueError(
                f"structured_outputs.{given[0]} has {num_bytes} bytes, at most {MAX_GRAMMAR_BYTES} are allowed"
            )
        if self.starts_after_token_id is not None:
            _check_integer("structured_outputs.starts_after_token_id", self.starts_after_token_id, 0, 2**31 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling settings with OpenAI's names, plus those that vLLM and SGLang users know.

    Raises:
        ValueError: naming the field, the value and the allowed range.
    """

    n: int = 1  # completions per prompt
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this
    top_k: int = -1  # keep the k likeliest tokens; -1 or 0 = all
    min_p: float = 0.0  # drop tokens less likely than min_p * (the likeliest)
    presence_penalty: float = 0.0  # subtracted once from every token already in the output
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens in prompt or output
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit, in [-100, 100]
    seed: int | None = None  # a request with a seed gives the same tokens whatever runs beside it
    max_tokens: int | None = 16  # at most this many output tokens; None = up to max_model_len
    min_tokens: int = 0  # end-of-sequence and stop_token_ids are masked before this many output tokens
    stop: tuple[str, ...] = ()  # end when the text contains one of these
    stop_token_ids: tuple[int, ...] = ()  # end after one of these
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # report the chosen token's logprob and this many of the likeliest
    prompt_logprobs: int | None = None  # the same for every token of the prompt but the first
    skip_special_tokens: bool = True  # leave special tokens out of the text
    structured_outputs: StructuredOutputsParams | None = None  # a grammar that the output must match

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if isinstance(self.structured_outputs, dict):
            object.__setattr__(self, "structured_outputs", _read_structured_outputs(self.structured_outputs))
        _check_integer("n", self.n, 1, MAX_N)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, exclude_low=True)
        _check_integer("top_k", self.top_k, -1, 2**31 - 1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, exclude_low=True)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_logit_bias()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise ValueError(f"stop must hold strings of 1 to {MAX_STOP_STRING_CHARS} characters, got {text!r}")
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0, 2**31 - 1)

    def _check_logit_bias(self) -> None:
        for token_id, bias in (self.logit_bias or {}).items():
            _check_integer("logit_bias token id", token_id, 0, 2**31 - 1)
            _check_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)


def _read_structured_outputs(fields: dict[str, object]) -> StructuredOutputsParams:
    unknown = [name for name in fields if name not in _FORMS]
    if unknown:
        raise ValueError(f"structured_outputs has the field {unknown[0]!r}; it may have one of {', '.join(_FORMS)}")
    return StructuredOutputsParams(**fields)  # type: ignore[arg-type]


def _write_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs.json cannot be written as JSON: {error}") from error


def _check_number(name: str, value: float, low: float, high: float, *, exclude_low: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    above = is_number and (value > low if exclude_low else value >= low)
    if not (above and value <= high):
        raise ValueError(f"{name} must be in {'(' if exclude_low else '['}{low:g}, {high:g}], got {value!r}")


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
