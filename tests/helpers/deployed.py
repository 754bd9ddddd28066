"""What files under ``deploy/`` say of the program: its command lines, read by the program's own parser."""

from collections.abc import Sequence
from pathlib import Path

from argosy.cli.flags import build_config
from argosy.cli.main import COMMANDS, parse_arguments
from argosy.cli.serve import ServeOptions
from argosy.config import EngineConfig
from argosy.server.run import CLOSE_S

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def read_serve_command(arguments: Sequence[str]) -> tuple[ServeOptions, EngineConfig]:
    """The valid settings of ``argosy serve ...``; raises what the program would."""
    name, parsed = parse_arguments(list(arguments))
    assert name == "serve", f"a deployment runs argosy serve, not argosy {name}"
    options = build_config(COMMANDS[name].options_class, parsed.serve)
    assert isinstance(options, ServeOptions)
    return options, build_config(EngineConfig, parsed.engine)


def least_grace_s(options: ServeOptions, before_s: float = 0.0) -> float:
    """How long whoever stops the server must wait before it kills: ``before_s`` passes before SIGTERM."""
    return before_s + options.shutdown_timeout_s + CLOSE_S
