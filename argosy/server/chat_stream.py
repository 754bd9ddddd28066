"""A chat completion as it streams: reasoning, content and tool calls told apart while the text grows.

The whole-text twin is ``models/deepseek/encoding_parser.py``. It repairs nothing: a block of calls that breaks the
format is told as content; and since what was told as a call cannot be taken back, a call is told when it is complete.
Who wants one call at most ends the completion behind it (``FirstCallEnd``).
Invariant: all pieces of one completion together equal what the twin reads of its text, where that parses.
"""

import msgspec

from argosy.models.deepseek.encoding import CALLS_END, CALLS_START, EOS_TOKEN, INVOKE_END, THINK_END
from argosy.models.deepseek.encoding_parser import ParsedToolCall, parse_completion

_CALLS_OPENING = f"\n\n{CALLS_START}\n"


class ChatPiece(msgspec.Struct, frozen=True):
    """What one piece of text brought; "" and () where nothing."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ParsedToolCall, ...] = ()


class ChatStream:
    """One completion. ``thinking``: the prompt ended with ``<think>``; ``has_tools``: calls are looked for, or, if not
    ``is_parallel``, one call."""

    def __init__(self, *, thinking: bool, has_tools: bool, is_parallel: bool = True) -> None:
        self._is_reasoning = thinking
        self._marks = (_CALLS_OPENING,) if has_tools else ()
        self._is_parallel = is_parallel
        self._held = ""  # may be the beginning of a mark
        self._calls: str | None = None  # the text of a block of calls so far
        self.num_tool_calls = 0

    @property
    def is_plain(self) -> bool:
        """Text is content as it comes: ``feed`` would change nothing."""
        return not (self._is_reasoning or self._marks or self._held) and self._calls is None

    def feed(self, text: str) -> ChatPiece:
        """Take new text; what it makes known."""
        if self._calls is not None:
            return self._feed_calls(text)
        reasoning = ""
        text = self._held + text
        self._held = ""
        if self._is_reasoning:
            before, mark, after = text.partition(THINK_END)
            if not mark:
                shown = len(text) - _num_held(text, (THINK_END,))
                self._held = text[shown:]
                return ChatPiece(reasoning=text[:shown])
            self._is_reasoning = False
            reasoning, text = before, after
        for mark in self._marks:
            before, found, after = text.partition(mark)
            if found:
                self._calls = ""
                piece = self._feed_calls(after)
                return ChatPiece(reasoning, before + piece.content, piece.tool_calls)
        shown = len(text) - _num_held(text, self._marks)
        self._held = text[shown:]
        return ChatPiece(reasoning, text[:shown])

    def finish(self) -> ChatPiece:
        """The text is over: what was held back."""
        held, self._held = self._held, ""
        if self._is_reasoning:
            return ChatPiece(reasoning=held)
        if self._calls is not None:
            rest, self._calls = self._calls, None
            return ChatPiece(content=_CALLS_OPENING + rest if rest.strip() and not self.num_tool_calls else "")
        return ChatPiece(content=held)

    def _feed_calls(self, text: str) -> ChatPiece:
        """A complete call is told at once; a block that breaks the format becomes content, and calls end."""
        assert self._calls is not None
        self._calls += text
        told: list[ParsedToolCall] = []
        while self._is_parallel or not self.num_tool_calls + len(told):
            invoke, mark, rest = self._calls.partition(f"{INVOKE_END}\n")
            if not mark:
                break
            try:
                parsed = parse_completion(f"{_CALLS_OPENING}{invoke}{mark}{CALLS_END}{EOS_TOKEN}", thinking=False)
            except ValueError:
                broken, self._calls, self._marks = self._calls, None, ()
                opening = "" if self.num_tool_calls + len(told) else _CALLS_OPENING
                return ChatPiece("", opening + broken, tuple(told))
            told += parsed.tool_calls
            self._calls = rest
        self.num_tool_calls += len(told)
        return ChatPiece(tool_calls=tuple(told))


class FirstCallEnd:
    """``TextEnd`` behind the first complete tool call."""

    def __init__(self, *, thinking: bool) -> None:
        self._stream = ChatStream(thinking=thinking, has_tools=True, is_parallel=False)

    def is_reached(self, text: str) -> bool:
        return bool(self._stream.feed(text).tool_calls)


def _num_held(text: str, marks: tuple[str, ...]) -> int:
    """Characters at the end of ``text`` that may begin one of the marks."""
    for size in range(min(len(text), max(map(len, marks), default=1) - 1), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
