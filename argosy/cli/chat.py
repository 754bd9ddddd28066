"""``argosy chat``: a conversation in the terminal, streamed; or, in a pipe, one answer for each line of stdin.

The conversation is resent every turn; the prefix cache makes that cheap. Ctrl-C stops the answer, not the program;
what was shown stays in the conversation. Invariant: stdout carries answers only, stderr everything else.
"""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from argosy.cli.invocation import EXIT_OK, Invocation
from argosy.cli.language_model import LanguageModel
from argosy.cli.speed import describe_speed, measure_speed
from argosy.cli.terminal import Terminal, watch_interrupt
from argosy.messages import RequestOutput
from argosy.sampling_params import SamplingParams

HELP_LINE = "/reset starts anew, /thinking switches reasoning on or off, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
THINKING_END = "</think>"
USER_PROMPT = "> "


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """Talk with the model in the terminal."""

    system: str | None = None  # a system message to start every conversation with
    thinking: bool = False  # let the model reason before it answers; /thinking switches
    debug: bool = False  # show tracebacks


def run_chat(options: ChatOptions, invocation: Invocation) -> int:
    terminal = invocation.terminal
    llm = invocation.build_llm(invocation.engine_config)
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
        self._thinking = thinking
        self._messages: list[dict[str, object]] = []
        self._reset()

    def run_command(self, command: str) -> str:
        """What to tell the user."""
        if command == "/reset":
            self._reset()
            return "a new conversation"
        if command == "/thinking":
            self._thinking = not self._thinking
            return f"thinking is {'on' if self._thinking else 'off'}"
        return f"unknown command {command}: {HELP_LINE}"

    def start_answer(self, text: str) -> Generator[RequestOutput, None, None]:
        """Outputs with cumulative text.

        Raises:
            ValueError: if the conversation has become too long; it is then as it was before this turn.
        """
        self._messages.append({"role": "user", "content": text})
        try:
            prompt = self._llm.encode_chat(self._messages, thinking=self._thinking)
            yield from self._llm.stream(prompt, self._sampling_params)
        except ValueError:
            self._messages.pop()
            raise

    def finish_answer(self, text: str) -> None:
        """Keeps the answer without its reasoning, which the encoding drops from earlier turns anyway."""
        self._messages.append({"role": "assistant", "content": text.rsplit(THINKING_END, 1)[-1]})

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]


def _answer(conversation: Conversation, question: str, terminal: Terminal) -> None:
    shown = ""
    output = None
    try:
        with watch_interrupt() as interrupt, contextlib.closing(conversation.start_answer(question)) as outputs:
            for output in outputs:
                text = output.outputs[0].text
                terminal.stdout.write(text[len(shown) :])
                terminal.stdout.flush()
                shown = text
                if interrupt.is_set:
                    break
    except ValueError as error:
        terminal.warn(f"error: {error} (/reset starts anew)")
        return
    conversation.finish_answer(shown)
    terminal.stdout.write("\n")
    terminal.stdout.flush()
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
        except KeyboardInterrupt:
            terminal.say("")
            continue
        except EOFError:
            return
        if not is_interactive and not line:
            return
        yield line.strip()
