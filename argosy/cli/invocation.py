"""What every command gets: the validated settings, the streams and the way to build the model.

Exit codes are here because every command shares them. Invariant: a command returns its exit code and never calls
``exit``.
"""

from dataclasses import dataclass

from argosy.cli.language_model import BuildLanguageModel, LanguageModel
from argosy.cli.terminal import Terminal
from argosy.config import EngineConfig
from argosy.sampling_params import SamplingParams

EXIT_OK = 0
EXIT_FAILED = 1  # the world failed, or a line, a gate, a score did
EXIT_USER_ERROR = 2  # what the user gave cannot be used
EXIT_INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells say it
EXIT_TERMINATED = 143  # 128 + SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a scheduler sends before it kills. Handled like Ctrl-C, so that what was finished is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invocation:
    """One run of one command. ``sampling_params`` is the default of a command that has no sampling flags."""

    engine_config: EngineConfig
    sampling_params: SamplingParams
    terminal: Terminal
    build_llm: BuildLanguageModel
    arguments: tuple[str, ...] = ()  # as typed, for reports that name their command

    def load_llm(self, config: EngineConfig | None = None) -> LanguageModel:
        """Of ``config``, or of the settings as given; says what its memory is spent on. Raises as ``build_llm``."""
        llm = self.build_llm(config or self.engine_config)
        for line in llm.memory_report:
            self.terminal.say(line)
        return llm
