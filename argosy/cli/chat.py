"""``argosy chat``: a conversation in the terminal, streamed; or, in a pipe, one answer for each line of stdin.

The conversation is resent every turn; the prefix cache makes that cheap. Ctrl-C stops the answer, not the program;
the answer as far as it was shown stays in the conversation. Invariant: stdout carries answers only, stderr everything
else, reasoning included.
"""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from argosy.cli.invocation import EXIT_OK, Invocation, Terminated
from argosy.cli.language_model import LanguageModel
from argosy.cli.reasoning import THINKING_END, split_stream, strip_reasoning
from argosy.cli.speed import describe_speed, measure_speed
from argosy.cli.terminal import Terminal, watch_interrupt
from argosy.messages import FinishReason, RequestOutput
from argosy.sampling_params import SamplingParams

HELP_LINE = "/reset starts anew, /thinking switches reasoning on or off, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
USER_PROMPT = "> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """Talk with the model in the terminal."""

    system: str | None = None  # a system message to start every conversation with
    thinking: bool = False  # let the model reason before it answers; /thinking switches
    debug: bool = False  # show tracebacks


def run_chat(options: ChatOptions, invocation: Invocation) -> int:
    terminal = invocation.terminal
    llm = invocation.load_llm()
    conversation = Conversation(llm, invocation.sampling_params, system=options.system, thinking=options.thinking)
    if terminal.stdin.isatty():
        terminal.say(HELP_LINE)
    for line in _read_turns(terminal):
        if line in ("/exit", "/quit"):
            break
        if line.startswith("/"):
            terminal.say(conversation.run_command(line))
        elif line:
            _answer(conversation, line, terminal)
    return EXIT_OK


class Conversation:
    """The messages so far, and what the slash commands change."""

    def __init__(
        self, llm: LanguageModel, sampling_params: SamplingParams, *, system: str | None, thinking: bool
    ) -> None:
        self._llm = llm
        self._sampling_params = sampling_params
        self._system = system
        self.thinking = thinking
        self._messages: list[dict[str, object]] = []
        self._reset()

    def run_command(self, command: str) -> str:
        """What to tell the user."""
        if command == "/reset":
            self._reset()
            return "a new conversation"
        if command == "/thinking":
            self.thinking = not self.thinking
            return f"thinking is {'on' if self.thinking else 'off'}"
        return f"unknown command {command}: {HELP_LINE}"

    def start_answer(self, text: str) -> Generator[RequestOutput, None, None]:
        """Outputs with cumulative text.

        Raises:
            ValueError: if the conversation has become too long; it is then as it was before this turn.
        """
        self._messages.append({"role": "user", "content": text})
        try:
            prompt = self._llm.encode_chat(self._messages, thinking=self.thinking)
            yield from self._llm.stream(prompt, self._sampling_params)
        except ValueError:
            self._messages.pop()
            raise

    def finish_answer(self, text: str) -> None:
        """Keeps the answer without its reasoning, which the encoding drops from earlier turns anyway."""
        self._messages.append({"role": "assistant", "content": strip_reasoning(text)})

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]


class _AnswerPrinter:
    """Shows a growing completion: the reasoning on stderr, dimmed in a terminal, and the answer on stdout."""

    def __init__(self, terminal: Terminal, *, thinking: bool) -> None:
        self._terminal = terminal
        self._thinking = thinking
        self._text = ""
        self._reasoning = ""
        self.answer = ""

    def show(self, text: str, *, is_finished: bool) -> None:
        """``text`` is cumulative."""
        reasoning, answer = split_stream(text, is_finished=is_finished) if self._thinking else ("", text)
        self._show_reasoning(reasoning[len(self._reasoning) :])
        if self._reasoning and answer and not self.answer:
            self._terminal.say("")
        self._write_answer(answer[len(self.answer) :])
        self._text = text

    def finish(self, finish_reason: str | None) -> None:
        """After the last ``show``; ``finish_reason`` is None if Ctrl-C ended it."""
        if self._reasoning and not self.answer:
            self._terminal.say("")
            if THINKING_END not in self._text and finish_reason == FinishReason.STOP:
                self._write_answer(self._text)  # it ended by itself: it answered without a word of reasoning
            elif THINKING_END not in self._text:
                self._terminal.say("[the reasoning was cut off before an answer; --max-tokens allows more]")
        self._write_answer("\n", is_part=False)

    def _show_reasoning(self, new: str) -> None:
        if new:
            is_dimmed = self._terminal.stderr.isatty()
            self._terminal.stderr.write(f"{DIM}{new}{PLAIN}" if is_dimmed else new)
            self._terminal.stderr.flush()
            self._reasoning += new

    def _write_answer(self, new: str, *, is_part: bool = True) -> None:
        self._terminal.stdout.write(new)
        self._terminal.stdout.flush()
        if is_part:
            self.answer += new


def _answer(conversation: Conversation, question: str, terminal: Terminal) -> None:
    printer = _AnswerPrinter(terminal, thinking=conversation.thinking)
    output = None
    try:
        with watch_interrupt() as interrupt, contextlib.closing(conversation.start_answer(question)) as outputs:
            for output in outputs:
                printer.show(output.outputs[0].text, is_finished=output.finished)
                if interrupt.is_set:
                    break
    except ValueError as error:
        terminal.warn(f"error: {error} (/reset starts anew)")
        return
    printer.finish(output.outputs[0].finish_reason if output else None)
    conversation.finish_answer(printer.answer)
    if output is not None:
        terminal.say(f"[{'stopped, ' if interrupt.is_set else ''}{describe_speed(measure_speed(output))}]")


def _read_turns(terminal: Terminal) -> Iterator[str]:
    """Lines until the end of input; in a terminal, Ctrl-C at the prompt only clears the line."""
    is_interactive = terminal.stdin.isatty()
    if is_interactive:
        # Line editing and history come from importing it; systems without it still have a plain prompt.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            line = input(USER_PROMPT) if is_interactive else terminal.stdin.readline()
        except Terminated:
            raise
        except KeyboardInterrupt:
            terminal.say("")
            continue
        except EOFError:
            return
        if not is_interactive and not line:
            return
        yield line.strip()
