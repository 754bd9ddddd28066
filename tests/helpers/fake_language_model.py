"""A language model without a model: answers from a function, finishes in a chosen order, counts what it was asked.

For tests of the command line. Tokens are the characters of the text, so lengths can be counted by eye.
"""

import io
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

from argosy.cli.terminal import Terminal
from argosy.config import EngineConfig
from argosy.messages import CompletionOutput, DeploymentStats, RequestMetrics, RequestOutput
from argosy.sampling_params import SamplingParams

Answer = Callable[[str], str]


@dataclass
class FakeLanguageModel:
    """``answer`` maps a prompt's text to its completion; a ValueError from it is a refused prompt."""

    answer: Answer
    finish_order: Callable[[int], list[int]] = field(default=lambda count: list(range(count)))
    interrupt_after: int | None = None  # results (of a batch) or outputs (of a stream) before Ctrl-C
    dtype_name: str = "float32"
    number_format: str = "float32"
    device_name: str = "a fake device"
    memory_report: tuple[str, ...] = ()
    vocab_size: int = 128
    special_token_ids: frozenset[int] = frozenset({0, 1})
    seen_params: list[SamplingParams] = field(default_factory=list)
    seen_prompts: list[str] = field(default_factory=list)
    num_closed: int = 0

    def build(self, config: EngineConfig) -> "FakeLanguageModel":
        return self

    def summarize_deployment(self) -> DeploymentStats:
        return DeploymentStats(
            num_ranks=4,
            num_steps=[30, 10],
            num_dummy_steps=[0, 20],
            num_scheduled_tokens=[300, 100],
            coordination_us=250.0,
            bytes_sent={"tp": 2_000_000, "ep": 1_500_000},
            tokens_per_expert=[[4, 0, 0, 0]],
            tokens_per_rank=[[4, 0]],
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        if any(message["role"] == "nobody" for message in messages):
            raise ValueError("role must be one of system, user, assistant, got 'nobody'")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return [ord(character) for character in (f"{text}<think>" if thinking else text)]

    def generate_as_finished(
        self, prompts: Sequence[object], sampling_params: Sequence[SamplingParams]
    ) -> Generator[tuple[int, RequestOutput | ValueError], None, None]:
        self.seen_params += sampling_params
        self.seen_prompts += [_text_of(prompt) for prompt in prompts]
        for num_yielded, position in enumerate(self.finish_order(len(prompts))):
            if num_yielded == self.interrupt_after:
                signal.raise_signal(signal.SIGINT)
            try:
                yield position, self._complete(_text_of(prompts[position]), sampling_params[position])
            except ValueError as error:
                yield position, error

    def stream(self, prompt: object, sampling_params: SamplingParams) -> Generator[RequestOutput, None, None]:
        self.seen_prompts.append(_text_of(prompt))
        self.seen_params.append(sampling_params)
        text = self.answer(_text_of(prompt))
        try:
            for length in range(1, len(text) + 1):
                if length - 1 == self.interrupt_after:
                    signal.raise_signal(signal.SIGINT)
                yield _output(_text_of(prompt), [text[:length]], is_finished=length == len(text))
        finally:
            self.num_closed += 1

    def _complete(self, prompt: str, params: SamplingParams) -> RequestOutput:
        text = self.answer(prompt)[: params.max_tokens]
        return _output(prompt, [text] * params.n, is_finished=True)


def fake_terminal(stdin: str | bytes = "") -> Terminal:
    """Streams in memory; read them with ``written``."""
    raw = stdin.encode() if isinstance(stdin, str) else stdin
    return Terminal(
        stdin=io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"),
        stdout=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
        stderr=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
    )


def written(stream: io.TextIOBase) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def _text_of(prompt: object) -> str:
    return prompt if isinstance(prompt, str) else "".join(chr(token) for token in prompt)  # type: ignore[attr-defined]


def _output(prompt: str, texts: list[str], *, is_finished: bool) -> RequestOutput:
    """Times as if the first token took 0.5 s and each later one 0.1 s."""
    length = len(texts[0])
    return RequestOutput(
        request_id="fake",
        prompt=prompt,
        prompt_token_ids=[ord(character) for character in prompt],
        outputs=[
            CompletionOutput(
                index=index,
                text=text,
                token_ids=[ord(character) for character in text],
                finish_reason="stop" if is_finished else None,
            )
            for index, text in enumerate(texts)
        ],
        finished=is_finished,
        metrics=RequestMetrics(10.0, 10.5, 10.5 + 0.1 * (length - 1) if is_finished else None),
    )
