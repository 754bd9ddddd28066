"""``LLM``: an engine, here or in many processes, in vLLM's shape. Prompts in, text out, results in input order.

It starts and ends the engine, and brings prompts and results into the shapes of its callers; the requests between them
are ``request_loop.py``'s. Not thread-safe: one thread, one call at a time. Invariant: when a call returns or raises,
none of its requests is left in the engine.
"""

import dataclasses
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Literal

import msgspec
from rich.console import Console
from rich.progress import Progress

from argosy.config import (
    DeviceName,
    DTypeName,
    EngineConfig,
    EPMode,
    EPPayload,
    IndexCacheDType,
    KVCacheDType,
    LLTransport,
    LoadFormat,
    QuantizationName,
)
from argosy.engine.build import BuiltEngine, StartProgress
from argosy.engine.deployment import RunningEngine, deploy, end_engine
from argosy.engine.deployment_stats import summarize_stats
from argosy.engine.dp_load_balancer import check_replica
from argosy.engine.engine_core import EngineCore
from argosy.engine.output_processor import OutputProcessor
from argosy.engine.prompts import Prompt, PromptChecker, as_params_list, as_prompt_list
from argosy.engine.replica_messages import ReplicaStats, UpdateSettings
from argosy.engine.request_loop import RequestLoop
from argosy.grammar.checker import GrammarChecker
from argosy.messages import DeploymentStats, RequestOutput
from argosy.models.deepseek.config import ModelConfig
from argosy.models.deepseek.encoding import THINK_END, encode_messages
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
        quantization: QuantizationName = "auto",
        load_format: LoadFormat = "auto",
        kv_cache_dtype: KVCacheDType = "auto",
        index_cache_dtype: IndexCacheDType = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        block_size: int = 64,
        num_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        device_memory_utilization: float = 0.9,
        async_scheduling: bool | None = None,
        enforce_eager: bool = False,
        emulate_graphs: bool = False,
        enable_prefix_caching: bool = True,
        num_threads: int | None = None,
        tp_size: int = 1,
        dp_size: int = 1,
        ep_size: int | None = None,
        first_device: int = 0,
        nnodes: int = 1,
        node_rank: int = 0,
        master_addr: str | None = None,
        master_port: int | None = None,
        ep_mode: EPMode = "auto",
        ll_max_tokens_per_rank: int | None = None,
        ll_transport: LLTransport = "collective",
        ep_payload: EPPayload = "model",
        collective_timeout_s: float = 30.0,
        startup_timeout_s: float = 120.0,
        weights_timeout_s: float = 3600.0,
        flight_recorder_dir: str | None = None,
    ) -> None:
        """See ``EngineConfig`` for the meaning of every setting."""
        config = EngineConfig(
            model=model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            quantization=quantization,
            load_format=load_format,
            kv_cache_dtype=kv_cache_dtype,
            index_cache_dtype=index_cache_dtype,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            device_memory_utilization=device_memory_utilization,
            async_scheduling=async_scheduling,
            enforce_eager=enforce_eager,
            emulate_graphs=emulate_graphs,
            enable_prefix_caching=enable_prefix_caching,
            num_threads=num_threads,
            tp_size=tp_size,
            dp_size=dp_size,
            ep_size=ep_size,
            first_device=first_device,
            nnodes=nnodes,
            node_rank=node_rank,
            master_addr=master_addr,
            master_port=master_port,
            ep_mode=ep_mode,
            ll_max_tokens_per_rank=ll_max_tokens_per_rank,
            ll_transport=ll_transport,
            ep_payload=ep_payload,
            collective_timeout_s=collective_timeout_s,
            startup_timeout_s=startup_timeout_s,
            weights_timeout_s=weights_timeout_s,
            flight_recorder_dir=flight_recorder_dir,
        )
        self._adopt(deploy(config))

    @classmethod
    def from_config(cls, config: EngineConfig, on_progress: StartProgress | None = None) -> "LLM":
        """``on_progress(stage, done, total)`` is told of the stages of the start that take long."""
        llm = cls.__new__(cls)
        llm._adopt(deploy(config, on_progress))
        return llm

    def _adopt(self, running: RunningEngine) -> None:
        assert running.config.max_model_len is not None
        self._running = running
        self._client = running.client
        self.tokenizer = running.tokenizer
        self.max_model_len: int = running.config.max_model_len
        self._loop = RequestLoop(
            running.client,
            PromptChecker(running.tokenizer, self.max_model_len),
            GrammarChecker(running.tokenizer.vocabulary),
            OutputProcessor(running.tokenizer),
        )
        self._settings = running.config
        # Ends the ranks of an LLM that nobody closed, when it is collected; at Python's exit ``deployment.py`` does.
        self._finalizer = weakref.finalize(self, end_engine, running.client)
        self._finalizer.atexit = False

    def close(self) -> None:
        """End the engine and its processes; a second time does nothing. Leaving a ``with`` block does it too."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def config(self) -> EngineConfig:
        """The settings in force: what was left to the engine is filled in."""
        return self._settings

    @property
    def model_config(self) -> ModelConfig:
        return self._running.model_config

    @property
    def vocab_size(self) -> int:
        """Ids that a prompt may hold: the tokenizer's entries, without the model's padding."""
        return self.tokenizer.vocab_size

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self.tokenizer.special_token_ids

    @property
    def dtype_name(self) -> str:
        return self._settings.dtype

    @property
    def number_format(self) -> str:
        return self._settings.number_format

    @property
    def device_name(self) -> str:
        return self._running.device_name

    @property
    def memory_report(self) -> tuple[str, ...]:
        """Lines for people: what the memory of an accelerator in this process is spent on; none on a CPU."""
        built = self._running.built
        return built.memory_use.lines() if built is not None and built.memory_use is not None else ()

    @property
    def num_graphs(self) -> int:
        """Recordings of decode steps on each rank."""
        return self._running.num_graphs

    @property
    def built(self) -> BuiltEngine:
        """What an engine in this process consists of.

        Raises:
            RuntimeError: it is in other processes.
        """
        if self._running.built is None:
            raise RuntimeError(
                f"the engine runs in {self.config.world_size} other processes; set tp_size and dp_size 1"
            )
        return self._running.built

    @property
    def engine(self) -> EngineCore:
        """``built.core``."""
        return self.built.core

    def update_settings(
        self,
        *,
        ep_mode: EPMode | None = None,
        ll_max_tokens_per_rank: int | None = None,
        max_num_batched_tokens: int | None = None,
        async_scheduling: bool | None = None,
        enforce_eager: bool | None = None,
    ) -> None:
        """Change settings between requests; None leaves one as it is. What was recorded is replayed in the exchange's
        mode of that time only.

        Raises:
            ValueError: a value that cannot work.
            RuntimeError: requests are unfinished, or the engine failed.
        """
        if enforce_eager is False and not self.num_graphs:
            raise ValueError("enforce_eager cannot be turned off: no decode step was recorded when the engine started")
        settings = UpdateSettings(
            ep_mode, ll_max_tokens_per_rank, max_num_batched_tokens, async_scheduling, enforce_eager
        )
        changes = {name: value for name, value in msgspec.structs.asdict(settings).items() if value is not None}
        config = dataclasses.replace(self._settings, **changes)  # checks the values
        self._client.update_settings(settings)
        self._settings = config

    def collect_stats(self) -> list[ReplicaStats]:
        """Counters of every replica and rank since the start, by dp rank."""
        return self._client.collect_stats()

    def summarize_deployment(self) -> DeploymentStats:
        """Steps, bytes between ranks and tokens per expert since the start: data for tuning and balancing."""
        return summarize_stats(self.collect_stats(), self.config.ep_size or self.config.world_size)

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: Literal["raise", "return"] = "raise",
        data_parallel_rank: int | None = None,
    ) -> list[Result]:
        """Complete prompts: strings, token-id lists, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}`` objects.

        Args:
            sampling_params: one for all, or one a prompt; None = ``SamplingParams()``.
            use_tqdm: a progress bar on stderr, if that is a terminal (the name is vLLM's).
            on_error: ``raise`` refuses the whole call for one bad prompt, before anything runs; ``return`` puts the
                ValueError in that prompt's place and completes the rest.
            data_parallel_rank: the replica that computes all of them; None = shared out by tokens.

        Raises:
            ValueError: no such replica, a bad prompt, or as many sampling_params as prompts were not given.
        """
        prompt_list = as_prompt_list(prompts)
        params_list = as_params_list(sampling_params, len(prompt_list))
        if data_parallel_rank is not None:
            check_replica(data_parallel_rank, self.config.dp_size)
        if on_error == "raise":
            for i, (prompt, params) in enumerate(zip(prompt_list, params_list, strict=True)):
                self._loop.check(prompt, params, f"prompt {i}: ")
        results: list[Result | None] = [None] * len(prompt_list)
        console = Console(stderr=True)
        is_shown = use_tqdm and console.is_terminal and len(prompt_list) > 1
        with (
            Progress(console=console, disable=not is_shown, transient=True) as progress,
            closing(self.generate_as_finished(prompt_list, params_list, data_parallel_rank)) as finished,
        ):
            bar = progress.add_task("generate", total=len(prompt_list))
            for i, result in finished:
                results[i] = result
                progress.advance(bar)
        complete = [result for result in results if result is not None]
        assert len(complete) == len(prompt_list), "a request was lost"
        return complete

    def generate_as_finished(
        self,
        prompts: Sequence[Prompt],
        sampling_params: Sequence[SamplingParams],
        data_parallel_rank: int | None = None,
    ) -> Generator[tuple[int, Result], None, None]:
        """(position in ``prompts``, result) in the order of finishing. Closing the iterator aborts the rest."""
        positions: dict[str, int] = {}
        try:
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                try:
                    positions[self._loop.start(prompt, params, data_parallel_rank, is_streamed=False)] = i
                except ValueError as error:
                    yield i, error
            while positions:
                for output in self._loop.step():
                    yield positions.pop(output.request_id), output
        finally:
            for request_id in positions:
                self._loop.abort(request_id)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Outputs of one prompt as it grows, text and tokens cumulative. Closing the iterator aborts the request.

        Raises:
            ValueError: a bad prompt, on the first ``next``.
        """
        request_id = self._loop.start(prompt, sampling_params or SamplingParams(), None, is_streamed=True)
        try:
            is_finished = False
            while not is_finished:
                for output in self._loop.step():
                    is_finished = output.finished
                    yield output
        finally:
            self._loop.abort(request_id)

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
        """Answer one conversation, or a list of them, in OpenAI's message shape; see ``generate``.

        With ``thinking``, ``structured_outputs`` hold for what comes after the reasoning.
        """
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
        params_list = as_params_list(sampling_params, len(conversations))
        params_list = [params for i, params in enumerate(params_list) if i not in errors]
        if thinking:
            params_list = [self._leave_reasoning_free(params) for params in params_list]
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

    def _leave_reasoning_free(self, params: SamplingParams) -> SamplingParams:
        if params.structured_outputs is None:
            return params
        token_id = self.tokenizer.encode_mark(THINK_END)
        structured = dataclasses.replace(params.structured_outputs, starts_after_token_id=token_id)
        return dataclasses.replace(params, structured_outputs=structured)
