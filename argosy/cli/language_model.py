"""What the commands need of the engine, as a protocol, and how the real one is built.

Commands depend on this and not on ``LLM``, so they can be tested with a fake and ``argosy --help`` needs no torch.
Invariant: only this file, ``load_plan.py``, ``validate.py`` and ``equality_table.py`` import the engine, inside
functions.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Protocol

from argosy.config import EngineConfig
from argosy.messages import DeploymentStats, RequestOutput
from argosy.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, object]
Message = Mapping[str, object]
Result = RequestOutput | ValueError  # a refused prompt's result is its error


class LanguageModel(Protocol):
    """The part of ``argosy.LLM`` that the commands use."""

    @property
    def vocab_size(self) -> int:
        """Ids that a prompt may hold."""

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    @property
    def dtype_name(self) -> str: ...

    @property
    def number_format(self) -> str:
        """The dtype, and what has fewer bits."""

    @property
    def device_name(self) -> str:
        """What the hardware calls itself."""

    @property
    def memory_report(self) -> tuple[str, ...]:
        """Lines for people; none where the memory is the host's."""

    def encode_chat(
        self, messages: Sequence[Message], *, thinking: bool = False, tools: Sequence[Message] | None = None
    ) -> list[int]:
        """Raises ValueError for messages that the chat encoding has no form for."""

    def generate_as_finished(
        self, prompts: Sequence[Prompt], sampling_params: Sequence[SamplingParams]
    ) -> Generator[tuple[int, Result], None, None]:
        """``(position in prompts, its result)`` in the order of finishing. Closing it aborts what has not finished."""

    def summarize_deployment(self) -> DeploymentStats:
        """What all ranks have counted."""

    def stream(self, prompt: Prompt, sampling_params: SamplingParams) -> Generator[RequestOutput, None, None]:
        """Outputs of one prompt with cumulative text; closing the generator aborts the request."""


BuildLanguageModel = Callable[[EngineConfig], LanguageModel]
HostRanks = Callable[[EngineConfig], None]


def build_llm(config: EngineConfig, on_progress: Callable[[str, int, int], None] | None = None) -> LanguageModel:
    """Loads the model. ``on_progress``: a stage of the start, how much of it is done, and of how much.

    Raises:
        ValueError: settings or a checkpoint that cannot work.
    """
    # Imported here: it brings torch, and no other command line answer should wait for that.
    from argosy.engine.generation import LLM

    return LLM.from_config(config, on_progress)


def host_ranks(config: EngineConfig) -> None:
    """Runs the ranks of a node other than 0 until node 0 ends them.

    Raises:
        ValueError: settings or a checkpoint that cannot work, or that differ from node 0's.
        RuntimeError: a rank, a node or the network failed.
    """
    # Imported here, as above.
    from argosy.engine.deployment import host_ranks as host

    host(config)
