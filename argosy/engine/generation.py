"""``LLM``: the engine in this process, in vLLM's shape. Prompts in, text out, results in input order.

It drives the step loop and joins tokenizer, engine and output processor; none of them knows another. Not
thread-safe: one thread, one call at a time. Invariant: when a call returns or raises, none of its requests is left
in the engine.
"""

import itertools
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from argosy.config import DeviceName, DTypeName, EngineConfig
from argosy.engine.build import BuiltEngine, build_engine
from argosy.engine.output_processor import OutputProcessor
from argosy.engine.prompts import Prompt, PromptChecker
from argosy.engine.request import Request
from argosy.messages import RequestOutput
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.encoding import encode_messages
from argosy.sampling_params import SamplingParams

Message = Mapping[str, object]
Result = RequestOutput | ValueError  # a refused prompt's result is its error


class LLM:
    """A loaded model that generates text.

    Raises:
        ValueError: settings or a checkpoint that cannot work.
        RuntimeError: a file or the device failed.
    """

    def __init__(
        self,
        model: str = "argosy-tiny",
        *,
        tokenizer: str | None = None,
        dtype: DTypeName = "auto",
        device: DeviceName = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        block_size: int = 64,
        num_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        device_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        num_threads: int | None = None,
    ) -> None:
        """See ``EngineConfig`` for the meaning of every setting."""
        config = EngineConfig(
            model=model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            device_memory_utilization=device_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            num_threads=num_threads,
        )
        self._adopt(build_engine(config))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLM":
        return cls.from_engine(build_engine(config))

    @classmethod
    def from_engine(cls, engine: BuiltEngine) -> "LLM":
        llm = cls.__new__(cls)
        llm._adopt(engine)
        return llm

    def _adopt(self, built: BuiltEngine) -> None:
        assert built.config.max_model_len is not None
        self.built = built
        self.engine = built.core
        self.tokenizer = built.tokenizer
        self.max_model_len: int = built.config.max_model_len
        self._checker = PromptChecker(built.tokenizer, self.max_model_len)
        self._processor = OutputProcessor(built.tokenizer)
        self._request_ids = (f"request-{i}" for i in itertools.count())

    @property
    def config(self) -> EngineConfig:
        """The settings in force: what was left to the engine is filled in."""
        return self.built.config

    @property
    def model_config(self) -> ModelConfig:
        return self.built.model_config

    @property
    def vocab_size(self) -> int:
        """Ids that a prompt may hold: the tokenizer's entries, without the model's padding."""
        return self.tokenizer.vocab_size

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self.tokenizer.special_token_ids

    @property
    def dtype_name(self) -> str:
        return self.built.config.dtype

    @property
    def device_name(self) -> str:
        return self.built.platform.device_name()

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[Result]:
        """Complete prompts: strings, token-id lists, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}`` objects.

        Args:
            sampling_params: one for all, or one a prompt; None = ``SamplingParams()``.
            use_tqdm: a progress bar on stderr, if that is a terminal (the name is vLLM's).
            on_error: ``raise`` refuses the whole call for one bad prompt, before anything runs; ``return`` puts the
                ValueError in that prompt's place and completes the rest.

        Raises:
            ValueError: a bad prompt, or as many sampling_params as prompts were not given.
        """
        prompt_list = _as_prompt_list(prompts)
        params_list = _as_params_list(sampling_params, len(prompt_list))
        if on_error == "raise":
            for i, (prompt, params) in enumerate(zip(prompt_list, params_list, strict=True)):
                self._check(prompt, params, f"prompt {i}: ")
        results: list[Result | None] = [None] * len(prompt_list)
        console = Console(stderr=True)
        is_shown = use_tqdm and console.is_terminal and len(prompt_list) > 1
        with (
            Progress(console=console, disable=not is_shown, transient=True) as progress,
            closing(self.generate_as_finished(prompt_list, params_list)) as finished,
        ):
            bar = progress.add_task("generate", total=len(prompt_list))
            for i, result in finished:
                results[i] = result
                progress.advance(bar)
        complete = [result for result in results if result is not None]
        assert len(complete) == len(prompt_list), "a request was lost"
        return complete

    def generate_as_finished(
        self, prompts: Sequence[Prompt], sampling_params: Sequence[SamplingParams]
    ) -> Generator[tuple[int, Result], None, None]:
        """(position in ``prompts``, result) in the order of finishing. Closing the iterator aborts the rest."""
        positions: dict[str, int] = {}
        try:
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                try:
                    positions[self._start(prompt, params, is_streamed=False)] = i
                except ValueError as error:
                    yield i, error
            while positions:
                for output in self._step():
                    yield positions.pop(output.request_id), output
        finally:
            for request_id in positions:
                self._abort(request_id)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Outputs of one prompt as it grows, text and tokens cumulative. Closing the iterator aborts the request.

        Raises:
            ValueError: a bad prompt, on the first ``next``.
        """
        request_id = self._start(prompt, sampling_params or SamplingParams(), is_streamed=True)
        try:
            is_finished = False
            while not is_finished:
                for output in self._step():
                    is_finished = output.finished
                    yield output
        finally:
            self._abort(request_id)

    # --- chat ---------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        use_tqdm: bool = True,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[Result]:
        """Answer one conversation, or a list of them, in OpenAI's message shape; see ``generate``."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts: list[Prompt] = []
        errors: dict[int, ValueError] = {}
        for i, conversation in enumerate(conversations):
            try:
                prompts.append(self.encode_chat(conversation, thinking=thinking, tools=tools))  # type: ignore[arg-type]
            except ValueError as error:
                if on_error == "raise":
                    raise ValueError(f"conversation {i}: {error}") from error
                errors[i] = error
        params_list = _as_params_list(sampling_params, len(conversations))
        params_list = [params for i, params in enumerate(params_list) if i not in errors]
        results = iter(self.generate(prompts, params_list, use_tqdm=use_tqdm, on_error=on_error))
        return [errors[i] if i in errors else next(results) for i in range(len(conversations))]

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in V3.2's own encoding.

        Raises:
            ValueError: messages that the encoding has no form for.
        """
        return self.tokenizer.encode(encode_messages(messages, thinking=thinking, tools=tools))

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _check(self, prompt: Prompt, params: SamplingParams, where: str) -> None:
        try:
            self._checker.check(prompt, params)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    def _start(self, prompt: Prompt, params: SamplingParams, *, is_streamed: bool) -> str:
        """Queue one prompt; its request id."""
        checked = self._checker.check(prompt, params)
        request_id = next(self._request_ids)
        children = self._processor.add_request(
            request_id, checked.text, checked.token_ids, params, time.monotonic(), is_streamed=is_streamed
        )
        try:
            for child in children:
                self.engine.add(
                    Request(child.request_id, checked.token_ids, child.sampling_params, self.model_config.eos_token_ids)
                )
        except ValueError:
            self._abort(request_id)
            raise
        return request_id

    def _step(self) -> list[RequestOutput]:
        processed = self._processor.process(self.engine.step(), time.monotonic())
        for request_id, reason in processed.finish_request_ids:
            self.engine.finish(request_id, reason)
        return processed.outputs

    def _abort(self, request_id: str) -> None:
        """End a request that is not over yet, without a trace."""
        for child_id in self._processor.remove(request_id):
            self.engine.abort(child_id)
        if not self.engine.scheduler.num_running and not self.engine.scheduler.num_waiting:
            self.engine.scheduler.drain()  # nobody is left to read the reports of these aborts


def _as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt becomes a list of one; a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    prompt_list = list(prompts)
    if prompt_list and all(isinstance(item, int) for item in prompt_list):
        return [prompt_list]  # type: ignore[list-item]
    return prompt_list  # type: ignore[return-value]


def _as_params_list(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    params_list = list(sampling_params)
    if len(params_list) != num_prompts:
        raise ValueError(
            f"{len(params_list)} sampling_params for {num_prompts} prompts; give one for all, or one for each prompt"
        )
    return params_list
