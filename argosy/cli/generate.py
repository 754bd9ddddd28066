"""``argosy generate``: completes one prompt, or a file of JSON lines.

A bad line fails alone, with its line number, and the exit code is 1 if any line failed. Ctrl-C keeps what was finished.
Invariant: output lines are in input order, one for each non-blank input line, unless interrupted.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Annotated, BinaryIO

import tyro

from argosy.cli.files import check_writable, open_for_writing, read_lines
from argosy.cli.invocation import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_TERMINATED, Invocation, Terminated
from argosy.cli.language_model import LanguageModel, Prompt
from argosy.cli.prompt_lines import PromptLine, read_prompt_lines
from argosy.cli.result_lines import ErrorLine, OrderedLineWriter, build_result_line
from argosy.cli.terminal import Terminal, show_progress
from argosy.messages import RequestOutput
from argosy.sampling_params import SamplingParams

STANDARD_STREAM = "-"
COMPLETION_SEPARATOR = "\n---\n"  # between the completions of one prompt, when n > 1

NumberedLine = tuple[int, PromptLine | ValueError]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """Complete a prompt, or every line of a JSONL file."""

    prompt: Annotated[str | None, tyro.conf.Positional] = None  # the text to continue
    chat: bool = False  # send prompt strings as a user message, through the chat encoding
    input: str | None = None  # JSON lines with prompt, messages or prompt_token_ids, and sampling fields; - = stdin
    output: str | None = None  # write results as JSON lines to this file; None = stdout
    debug: bool = False  # show tracebacks

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.input is None):
            found = "neither" if self.prompt is None else "both"
            raise ValueError(f"give either a PROMPT or --input FILE.jsonl (- = standard input); found {found}")
        if self.input and self.output and _is_same_file(self.input, self.output):
            raise ValueError(f"--output {self.output} is the input file; name another file")


def run_generate(options: GenerateOptions, invocation: Invocation) -> int:
    if options.prompt is not None and options.output is None:
        return _print_completion(options.prompt, options, invocation)
    prompt_lines = _read_lines(options, invocation)
    if not prompt_lines:
        raise ValueError(f"--input {options.input} has no lines; give at least one, {{'prompt': ...}}, say")
    check_writable("--output", options.output)
    llm = invocation.load_llm()
    with _open_output(options.output, invocation.terminal) as stream:
        batch = _LineBatch(prompt_lines, OrderedLineWriter(stream))
        return _complete_lines(batch, llm, options, invocation.terminal)


def _print_completion(prompt_text: str, options: GenerateOptions, invocation: Invocation) -> int:
    llm = invocation.load_llm()
    line = PromptLine(text=prompt_text, sampling_params=invocation.sampling_params)
    prompt = _prepare_prompt(line, llm, chat=options.chat)
    for _, result in llm.generate_as_finished([prompt], [line.sampling_params]):
        if isinstance(result, ValueError):
            raise result
        print(COMPLETION_SEPARATOR.join(item.text for item in result.outputs), file=invocation.terminal.stdout)
    return EXIT_OK


def _complete_lines(batch: "_LineBatch", llm: LanguageModel, options: GenerateOptions, terminal: Terminal) -> int:
    batch.prepare(llm, chat=options.chat)
    try:
        with show_progress(terminal, "generate", batch.num_lines) as progress:
            for _ in batch.run(llm):
                progress.advance()
    except KeyboardInterrupt as interrupt:
        batch.writer.write_rest()
        terminal.warn(f"interrupted: {batch.num_done} of {batch.num_lines} results written")
        return EXIT_TERMINATED if isinstance(interrupt, Terminated) else EXIT_INTERRUPTED
    if batch.num_failed:
        terminal.warn(f"{batch.num_failed} of {batch.num_lines} lines failed; see the error fields of the output")
        return EXIT_FAILED
    return EXIT_OK


class _LineBatch:
    """The lines of one run: which are ready for the model, which have failed."""

    def __init__(self, lines: list[NumberedLine], writer: OrderedLineWriter) -> None:
        self.writer = writer
        self.num_done = 0
        self.num_failed = 0
        self._lines = lines
        self._indices: list[int] = []  # position among the good prompts -> index of the output line
        self._prompts: list[Prompt] = []
        self._sampling_params: list[SamplingParams] = []

    def prepare(self, llm: LanguageModel, *, chat: bool) -> None:
        for index, (_, line) in enumerate(self._lines):
            if isinstance(line, ValueError):
                self._fail(index, line)
                continue
            try:
                self._prompts.append(_prepare_prompt(line, llm, chat=chat))
            except ValueError as error:
                self._fail(index, error)
            else:
                self._sampling_params.append(line.sampling_params)
                self._indices.append(index)

    @property
    def num_lines(self) -> int:
        return len(self._lines)

    def run(self, llm: LanguageModel) -> Iterator[None]:
        """Yields after every result."""
        with closing(llm.generate_as_finished(self._prompts, self._sampling_params)) as results:
            for position, result in results:
                self._finish(self._indices[position], result)
                yield

    def _finish(self, index: int, result: RequestOutput | ValueError) -> None:
        if isinstance(result, ValueError):
            self._fail(index, result)
            return
        self.num_done += 1
        self.writer.add(build_result_line(index, result))

    def _fail(self, index: int, error: ValueError) -> None:
        self.num_failed += 1
        self.num_done += 1
        self.writer.add(ErrorLine(index, f"line {self._lines[index][0]}: {error}"))


def _prepare_prompt(line: PromptLine, llm: LanguageModel, *, chat: bool) -> Prompt:
    if line.messages is not None:
        return llm.encode_chat(line.messages, thinking=line.thinking, tools=line.tools)
    if line.token_ids is not None:
        return line.token_ids
    assert line.text is not None
    return llm.encode_chat([{"role": "user", "content": line.text}]) if chat else line.text


def _is_same_file(left: str, right: str) -> bool:
    return os.path.exists(left) and os.path.exists(right) and os.path.samefile(left, right)


def _read_lines(options: GenerateOptions, invocation: Invocation) -> list[NumberedLine]:
    flags = invocation.sampling_params
    if options.prompt is not None:
        return [(1, PromptLine(text=options.prompt, sampling_params=flags))]
    if options.input == STANDARD_STREAM:
        return list(read_prompt_lines(invocation.terminal.stdin.buffer, flags))
    assert options.input is not None
    return list(read_prompt_lines(read_lines("--input", options.input), flags))


@contextmanager
def _open_output(path: str | None, terminal: Terminal) -> Iterator[BinaryIO]:
    if path is None or path == STANDARD_STREAM:
        yield terminal.stdout.buffer
        return
    with open_for_writing("--output", path) as stream:
        yield stream
