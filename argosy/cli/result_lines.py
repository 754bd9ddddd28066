"""The output lines of ``argosy generate``, and the writer that keeps them (and those of ``eval``) in input order.

Results finish in any order; a line is written as soon as all lines before it are. Invariant: every line is flushed
when it is written, so a killed process leaves whole lines only.
"""

from typing import BinaryIO, Protocol

import msgspec

from argosy.messages import CompletionOutput, RequestOutput, TokenLogprobs


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One of several completions, when ``n`` > 1."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None


class ResultLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """The only completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class SeveralResultsLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """All completions of a prompt with ``n`` > 1; usage counts the prompt once."""

    index: int
    outputs: list[CompletionLine]
    usage: Usage
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class ErrorLine(msgspec.Struct, frozen=True):
    index: int
    error: str


OutputLine = ResultLine | SeveralResultsLine | ErrorLine


class IndexedLine(Protocol):
    """A msgspec struct with its place in the output."""

    @property
    def index(self) -> int: ...


def build_result_line(index: int, output: RequestOutput) -> OutputLine:
    completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    prompt_tokens = len(output.prompt_token_ids)
    usage = Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)
    if len(output.outputs) > 1:
        completions = [_build_completion_line(item) for item in output.outputs]
        return SeveralResultsLine(index, completions, usage, output.prompt_logprobs)
    only = output.outputs[0]
    return ResultLine(
        index, only.text, only.token_ids, only.finish_reason, usage, only.logprobs, output.prompt_logprobs
    )


class OrderedLineWriter:
    """Writes lines by index from 0, each as soon as its predecessors are written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._waiting: dict[int, IndexedLine] = {}
        self._next_index = 0

    def add(self, line: IndexedLine) -> None:
        self._waiting[line.index] = line
        while self._next_index in self._waiting:
            self._write(self._waiting.pop(self._next_index))
            self._next_index += 1

    def write_rest(self) -> None:
        """After an interruption: finished lines whose predecessors never came, still in order, with gaps."""
        for index in sorted(self._waiting):
            self._write(self._waiting.pop(index))

    def _write(self, line: IndexedLine) -> None:
        self._stream.write(msgspec.json.encode(line) + b"\n")
        self._stream.flush()


def _build_completion_line(completion: CompletionOutput) -> CompletionLine:
    return CompletionLine(completion.text, completion.token_ids, completion.finish_reason, completion.logprobs)
