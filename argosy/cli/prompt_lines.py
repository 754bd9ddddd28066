"""Reads the input lines of ``argosy generate``: JSON objects, one a line.

A line has exactly one of ``prompt``, ``messages``, ``prompt_token_ids``, and may have any field of ``SamplingParams``,
which then replaces the flag for this line; ``messages`` may come with ``thinking`` and ``tools``. It does not tokenise
and does not know the model. Invariant: a line becomes a ``PromptLine`` or a ``ValueError`` that names the field; it
never stops the others.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import msgspec

from argosy.sampling_params import SamplingParams

PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")
CHAT_FIELDS = ("thinking", "tools")
SAMPLING_FIELDS = tuple(spec.name for spec in fields(SamplingParams))
BOOLEAN_FIELDS = tuple(spec.name for spec in fields(SamplingParams) if isinstance(spec.default, bool))
LIST_FIELDS = ("stop", "stop_token_ids")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLine:
    """One line, checked as far as it can be without a model. Exactly one of text, token_ids, messages is set."""

    sampling_params: SamplingParams
    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[dict[str, object]] | None = None
    thinking: bool = False
    tools: list[dict[str, object]] | None = None


def read_prompt_lines(lines: Iterable[bytes], flags: SamplingParams) -> Iterator[tuple[int, PromptLine | ValueError]]:
    """``(line number from 1, the line or what is wrong with it)``; blank lines are skipped."""
    for line_number, raw in enumerate(lines, start=1):
        content = (raw.removeprefix(BYTE_ORDER_MARK) if line_number == 1 else raw).strip()
        if not content:
            continue
        try:
            yield line_number, parse_prompt_line(content, flags)
        except ValueError as error:
            yield line_number, error


def parse_prompt_line(content: bytes, flags: SamplingParams) -> PromptLine:
    """Raises ValueError naming the field, its value and the rule."""
    record = decode_json_object(content)
    unknown = [name for name in record if name not in (*PROMPT_FIELDS, *CHAT_FIELDS, *SAMPLING_FIELDS)]
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r}; a line has one of {', '.join(PROMPT_FIELDS)}, sampling fields, "
            f"and with messages also {', '.join(CHAT_FIELDS)}"
        )
    given = [name for name in PROMPT_FIELDS if name in record]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise ValueError(f"a line needs exactly one of {', '.join(PROMPT_FIELDS)}; found {found}")
    sampling_params = _override_sampling(record, flags)
    if given[0] == "messages":
        return _parse_messages(record, sampling_params)
    for name in CHAT_FIELDS:
        if name in record:
            raise ValueError(f"{name} goes with messages, not with {given[0]}")
    if given[0] == "prompt":
        if not isinstance(record["prompt"], str):
            raise ValueError(f"prompt must be a string, got {_shorten(record['prompt'])}")
        return PromptLine(text=record["prompt"], sampling_params=sampling_params)
    return PromptLine(token_ids=_check_token_ids(record["prompt_token_ids"]), sampling_params=sampling_params)


def decode_json_object(content: bytes) -> dict[str, object]:
    """Raises ValueError unless ``content`` is one JSON object in UTF-8."""
    try:
        record = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, got {_shorten(record)}")
    return record


def _override_sampling(record: dict[str, object], flags: SamplingParams) -> SamplingParams:
    changes = {name: record[name] for name in SAMPLING_FIELDS if name in record}
    for name in BOOLEAN_FIELDS:
        if name in changes and not isinstance(changes[name], bool):
            raise ValueError(f"{name} must be true or false, got {_shorten(changes[name])}")
    for name in LIST_FIELDS:
        value = changes.get(name)
        if value is not None and not isinstance(value, list) and not (name == "stop" and isinstance(value, str)):
            raise ValueError(f"{name} must be a list, got {_shorten(value)}")
    if changes.get("logit_bias") is not None:
        changes["logit_bias"] = _parse_logit_bias(changes["logit_bias"])
    return replace(flags, **changes)  # type: ignore[arg-type]


def _parse_logit_bias(value: object) -> dict[int, object]:
    # JSON keys are strings; the bias itself is checked by SamplingParams.
    if not isinstance(value, dict):
        raise ValueError(f"logit_bias must be an object of token id -> bias, got {_shorten(value)}")
    for key in value:
        if not (key.isascii() and key.isdigit()):
            raise ValueError(f"logit_bias has the key {key!r}; keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


def _parse_messages(record: dict[str, object], sampling_params: SamplingParams) -> PromptLine:
    thinking = record.get("thinking", False)
    if not isinstance(thinking, bool):
        raise ValueError(f"thinking must be true or false, got {_shorten(thinking)}")
    tools = record.get("tools")
    return PromptLine(
        messages=_check_objects("messages", record["messages"]),
        thinking=thinking,
        tools=None if tools is None else _check_objects("tools", tools),
        sampling_params=sampling_params,
    )


def _check_objects(name: str, value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{name} must be a non-empty list of objects, got {_shorten(value)}")
    return value


def _check_token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {_shorten(value)}")
    return value


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
