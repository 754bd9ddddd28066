"""Reads a finished completion in DeepSeek-V3.2's chat format: reasoning, content and tool calls.

It parses whole completions and repairs nothing; streaming them is not its work. Invariant: it is the inverse of
``encoding.py``, so a text that parses is one that the encoder could have written.
"""

import re
from dataclasses import dataclass

from argosy.models.deepseek.encoding import (
    BOS_TOKEN,
    CALLS_END,
    CALLS_START,
    DSML_TOKEN,
    EOS_TOKEN,
    INVOKE_END,
    INVOKE_START,
    PARAMETER_END,
    PARAMETER_START,
    THINK_END,
    THINK_START,
)
from argosy.models.deepseek.encoding_messages import load_json, to_json

_MARKUP = (BOS_TOKEN, EOS_TOKEN, THINK_START, THINK_END, DSML_TOKEN)
_CALLS_OPENING = f"\n\n{CALLS_START}\n"
_INVOKE_HEAD = re.compile(r' name="(.+?)">\n\n?', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*)', re.DOTALL)
_NUM_SHOWN_CHARS = 40


@dataclass(frozen=True, slots=True)
class ParsedToolCall:
    name: str
    arguments: str  # a JSON object, as OpenAI's API has it


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """What an assistant said. Reasoning and content are "" where there is none."""

    content: str
    reasoning_content: str = ""
    tool_calls: tuple[ParsedToolCall, ...] = ()

    def as_message(self) -> dict[str, object]:
        """The assistant message in OpenAI's shape, to be appended to a conversation."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


def parse_completion(text: str, *, thinking: bool) -> ParsedMessage:
    """Splits a completion that ended by itself.

    The text must end with ``EOS_TOKEN``, by which a finished answer differs from one cut off; append it where the
    detokenizer left it out. Only after tool calls, which have an end of their own, may it be missing.

    Args:
        thinking: whether the prompt ended with ``<think>``; then the text must hold a ``</think>``.

    Raises:
        ValueError: saying at which character what was expected, and what stands there.
    """
    cursor = _Cursor(text)
    reasoning = ""
    if thinking:
        reasoning, mark = cursor.read_until(THINK_END, _CALLS_OPENING)
        if mark != THINK_END:
            raise cursor.error(f"the reasoning to end with {THINK_END}")
    content, mark = cursor.read_until(EOS_TOKEN, _CALLS_OPENING)
    if mark is None:
        raise cursor.error(f"{EOS_TOKEN} or a tool call block")
    tool_calls: tuple[ParsedToolCall, ...] = ()
    if mark == _CALLS_OPENING:
        tool_calls = _parse_calls(cursor)
        cursor.try_skip(EOS_TOKEN)
    if not cursor.is_at_end:
        raise cursor.error("the end of the completion")
    for field, value in (("reasoning", reasoning), ("content", content)):
        for token in _MARKUP:
            if token in value:
                raise ValueError(f"the completion's {field} must not hold {token!r}")
    return ParsedMessage(content, reasoning, tool_calls)


class _Cursor:
    """A place in the completion."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    @property
    def is_at_end(self) -> bool:
        return self._position == len(self._text)

    def read_until(self, *marks: str) -> tuple[str, str | None]:
        """The text before the first of the marks, and that mark, which is skipped; the rest and None without one."""
        found = [(place, mark) for mark in marks if (place := self._text.find(mark, self._position)) >= 0]
        if not found:
            rest = self._text[self._position :]
            self._position = len(self._text)
            return rest, None
        place, mark = min(found)
        before = self._text[self._position : place]
        self._position = place + len(mark)
        return before, mark

    def try_skip(self, literal: str) -> bool:
        is_here = self._text.startswith(literal, self._position)
        if is_here:
            self._position += len(literal)
        return is_here

    def expect(self, literal: str) -> None:
        if not self.try_skip(literal):
            raise self.error(repr(literal))

    def error(self, expected: str) -> ValueError:
        here = self._text[self._position : self._position + _NUM_SHOWN_CHARS]
        return ValueError(
            f"the completion is malformed at character {self._position}: expected {expected}, "
            f"found {repr(here) if here else 'its end'}"
        )


def _parse_calls(cursor: _Cursor) -> tuple[ParsedToolCall, ...]:
    calls = []
    while not cursor.try_skip(CALLS_END):
        cursor.expect(INVOKE_START)
        calls.append(_parse_call(cursor))
        cursor.expect("\n")
    return tuple(calls)


def _parse_call(cursor: _Cursor) -> ParsedToolCall:
    head, mark = cursor.read_until(PARAMETER_START, INVOKE_END)
    match = _INVOKE_HEAD.fullmatch(head)
    if mark is None or match is None or DSML_TOKEN in head:
        raise cursor.error(
            f'{INVOKE_START} name="...">, parameters and {INVOKE_END} (found {head[:_NUM_SHOWN_CHARS]!r})'
        )
    arguments: dict[str, str] = {}
    while mark == PARAMETER_START:
        name, value = _parse_parameter(cursor)
        if name in arguments:
            raise cursor.error(f"each parameter once ({name!r} is there twice)")
        arguments[name] = value
        cursor.expect("\n")
        mark = PARAMETER_START if cursor.try_skip(PARAMETER_START) else INVOKE_END
        if mark == INVOKE_END:
            cursor.expect(INVOKE_END)
    body = ", ".join(f"{to_json(name, 'a parameter name')}: {value}" for name, value in arguments.items())
    return ParsedToolCall(match.group(1), f"{{{body}}}")


def _parse_parameter(cursor: _Cursor) -> tuple[str, str]:
    """One parameter's name and the JSON of its value; the cursor stands after its closing tag."""
    text, mark = cursor.read_until(PARAMETER_END)
    match = _PARAMETER.fullmatch(text)
    # Markup inside a value means that a closing tag is missing before it.
    if mark is None or match is None or DSML_TOKEN in text:
        raise cursor.error(
            f'{PARAMETER_START} name="..." string="true|false">...{PARAMETER_END} (found {text[:_NUM_SHOWN_CHARS]!r})'
        )
    name, is_string, value = match.groups()
    if is_string == "true":
        return name, to_json(value, f"the parameter {name!r}")
    load_json(value, f'the parameter {name!r}, marked string="false",')
    return name, value
