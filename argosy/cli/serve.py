"""``argosy serve``: an OpenAI-compatible server over a model.

Invariant: a key is never printed, and one from the environment needs no flag.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated

import tyro

from argosy.cli.code_version import read_version
from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.cli.terminal import show_stages
from argosy.config import EngineConfig
from argosy.server.settings import ServerConfig

KEY_VARIABLE = "ARGOSY_API_KEY"  # several are parted by commas
ADMIN_KEY_VARIABLE = "ARGOSY_ADMIN_API_KEY"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions(ServerConfig):
    """Serve a model over HTTP, with OpenAI's API."""

    model_name: Annotated[str | None, tyro.conf.Positional] = None  # as --model
    debug: bool = False  # show tracebacks


def run_serve(options: ServeOptions, invocation: Invocation) -> int:
    """Serve until SIGTERM or Ctrl-C; 1 if requests were cut off by the end of the shutdown's time."""
    from argosy.server.run import serve  # FastAPI takes a while to import

    terminal = invocation.terminal
    config = _read_config(options, invocation, os.environ)
    with show_stages(terminal) as on_progress:
        is_complete = serve(
            config,
            read_settings(options, os.environ),
            version=read_version(),
            say=terminal.say,
            on_progress=on_progress,
        )
    terminal.say("the server has ended")
    return EXIT_OK if is_complete else EXIT_FAILED


def run_serve_node(options: ServeOptions, invocation: Invocation) -> int:
    """On a node other than 0: compute for node 0 until it ends, or a signal comes."""
    from argosy.server.node import NodePatience, host_node
    from argosy.server.run import CLOSE_S

    config = _read_config(options, invocation, os.environ)
    patience = NodePatience(leave_s=options.shutdown_timeout_s + CLOSE_S)
    return host_node(config, patience, invocation.terminal.say)


def read_settings(options: ServeOptions, environment: Mapping[str, str]) -> ServerConfig:
    """The server's part, with keys of the environment: those on a command line are seen by all users of a machine."""
    settings = ServerConfig(**{spec.name: getattr(options, spec.name) for spec in fields(ServerConfig)})
    keys = tuple(key for key in environment.get(KEY_VARIABLE, "").split(",") if key)
    admin_key = settings.admin_api_key or environment.get(ADMIN_KEY_VARIABLE) or None
    return replace(settings, api_key=(*settings.api_key, *keys), admin_api_key=admin_key)


def _read_config(options: ServeOptions, invocation: Invocation, environment: Mapping[str, str]) -> EngineConfig:
    if all(name in environment for name in TORCHRUN_VARIABLES):
        raise ValueError(
            f"torchrun started this process ({' and '.join(TORCHRUN_VARIABLES)} are set), but a server starts its "
            "ranks itself; run argosy serve once a node, with --nnodes, --node-rank, --master-addr and --master-port"
        )
    return _with_model(invocation.engine_config, options.model_name)


def _with_model(config: EngineConfig, name: str | None) -> EngineConfig:
    if name is None:
        return config
    if config.model not in (EngineConfig().model, name):
        raise ValueError(f"two models are given, {name!r} and --model {config.model!r}; give one")
    return replace(config, model=name)
