"""The ``argosy`` program: parses flags, runs one command, turns errors into one line and an exit code.

Exit codes: 0 done; 1 the world failed, or a line, a gate or a score did; 2 what the user gave cannot be used; 130
Ctrl-C; 143 SIGTERM. Invariant: a user sees a traceback only with ``--debug``.
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import partial, reduce
from operator import or_
from types import FrameType, MappingProxyType
from typing import Annotated, Any, NoReturn

import tyro

from argosy.cli.bench import BenchOptions, run_bench
from argosy.cli.bench_serve import BenchServeOptions, run_bench_serve
from argosy.cli.chat import ChatOptions, run_chat
from argosy.cli.code_version import read_version
from argosy.cli.demo import DemoOptions, run_demo
from argosy.cli.eval import EvalOptions, run_eval
from argosy.cli.flags import build_config, build_flag_class
from argosy.cli.generate import GenerateOptions, run_generate
from argosy.cli.invocation import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_TERMINATED,
    EXIT_USER_ERROR,
    Invocation,
    Terminated,
)
from argosy.cli.language_model import BuildLanguageModel, HostRanks, LanguageModel, build_llm, host_ranks
from argosy.cli.load_plan import LoadPlanOptions, run_load_plan
from argosy.cli.quantize import QuantizeOptions, run_quantize
from argosy.cli.serve import ServeOptions, run_serve, run_serve_node
from argosy.cli.terminal import Terminal, show_stages, system_terminal
from argosy.cli.validate import ValidateOptions, run_validate
from argosy.config import EngineConfig
from argosy.sampling_params import SamplingParams

DESCRIPTION = "DeepSeek-V3.2 on one machine: generate, chat, measure, validate."

# NOTE: a command answers the same way every time unless told otherwise, so it is greedy; --seed is the engine's, which
# gives every request without a seed of its own a different one.
SAMPLING_DEFAULTS: Mapping[str, object] = MappingProxyType({"temperature": 0.0, "max_tokens": 256})
GENERATE_OMITS = frozenset({"seed", "structured_outputs"})  # a grammar is a field of an input line
CHAT_OMITS = GENERATE_OMITS | {"n", "logprobs", "prompt_logprobs", "skip_special_tokens"}
NO_OMITS: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionOptions:
    """Print the version."""

    debug: bool = False  # show tracebacks


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One subcommand: its own options, what it runs, and which shared flags it takes."""

    options_class: type
    run: Callable[[Any, Invocation], int]
    has_engine_flags: bool = True
    sampling_omits: frozenset[str] | None = None  # None: no sampling flags
    run_node: Callable[[Any, Invocation], int] | None = None  # on nodes other than 0; None: computes once for node 0


def run_version(options: VersionOptions, invocation: Invocation) -> int:
    print(f"argosy {read_version()}", file=invocation.terminal.stdout)
    return EXIT_OK


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "generate": Command(options_class=GenerateOptions, run=run_generate, sampling_omits=GENERATE_OMITS),
        "chat": Command(options_class=ChatOptions, run=run_chat, sampling_omits=CHAT_OMITS),
        "demo": Command(options_class=DemoOptions, run=run_demo),
        "eval": Command(options_class=EvalOptions, run=run_eval),
        "validate": Command(options_class=ValidateOptions, run=run_validate),
        "serve": Command(options_class=ServeOptions, run=run_serve, run_node=run_serve_node),
        "bench": Command(options_class=BenchOptions, run=run_bench),
        "bench serve": Command(options_class=BenchServeOptions, run=run_bench_serve, has_engine_flags=False),
        "quantize": Command(options_class=QuantizeOptions, run=run_quantize, has_engine_flags=False),
        "version": Command(options_class=VersionOptions, run=run_version, has_engine_flags=False),
    }
)


def run_program() -> int:
    """The console script: ``main`` on this process's arguments and streams; the exit code."""
    terminal = system_terminal()
    for stream in (terminal.stdout, terminal.stderr):
        # A terminal that cannot show a character (an old locale) gets a mark instead of an exception.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminate)
    # Before torch is imported, for under torchrun this process is a rank: torch warns of every wait for another rank,
    # and when one fails, its stack traces would bury our report.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        exit_code = main(sys.argv[1:], terminal=terminal)
        terminal.stdout.flush()
    except BrokenPipeError:
        # The reader of our stdout has left (``argosy ... | head``): no message, and no second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.stdout.fileno())
        return EXIT_FAILED
    finally:
        # What is left to do is to end ranks, which is bounded; a second Ctrl-C would only add a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return exit_code


def main(
    arguments: Sequence[str],
    *,
    build_llm: BuildLanguageModel | None = None,
    host_ranks: HostRanks = host_ranks,
    terminal: Terminal | None = None,
) -> int:
    """The exit code. Flags that cannot be parsed end in ``SystemExit(2)``, as with every Python program."""
    terminal = terminal or system_terminal()
    build_llm = build_llm or partial(_build_llm, terminal)
    name, parsed = parse_arguments(arguments)
    command, flags = COMMANDS[name], getattr(parsed, _identifier(name))
    try:
        if command.has_engine_flags and parsed.plan.load_plan:
            # Before the command's own options are looked at: a plan needs no prompt.
            return run_load_plan(_build_invocation(command, parsed, tuple(arguments), terminal, build_llm))
        options: object = build_config(command.options_class, flags)
        invocation = _build_invocation(command, parsed, tuple(arguments), terminal, build_llm)
        if invocation.engine_config.node_rank > 0:
            if command.run_node is not None:
                return command.run_node(options, invocation)
            return _host_ranks(invocation, host_ranks)
        return command.run(options, invocation)
    except Terminated:
        terminal.warn("terminated")
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        terminal.warn("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if flags.debug:
            traceback.print_exc(file=terminal.stderr)
        return _report_error(error, terminal)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, Any]:
    """The command's name, and its flags in groups: its own under its name, ``engine``, ``sampling``.

    Raises:
        SystemExit: with 0 after ``--help``, with 2 for flags that cannot be parsed.
    """
    name = " ".join(arguments[:2])
    if name not in COMMANDS:  # most names are one word
        name = " ".join(arguments[:1])
    if name not in COMMANDS:
        _explain_commands(arguments)
    command = COMMANDS[name]
    parsed: Any = tyro.cli(
        _build_arguments_class(name, command),
        prog=f"argosy {name}",
        description=command.options_class.__doc__,
        args=list(arguments[len(name.split()) :]),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return name, parsed


def _build_llm(terminal: Terminal, config: EngineConfig) -> LanguageModel:
    with show_stages(terminal) as on_progress:
        return build_llm(config, on_progress)


def _host_ranks(invocation: Invocation, host_ranks: HostRanks) -> int:
    """Node 0 runs the command; this node computes for it."""
    config = invocation.engine_config
    invocation.terminal.say(f"node {config.node_rank} of {config.nnodes}: computes until node 0 is done")
    host_ranks(config)
    return EXIT_OK


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    raise Terminated


def _explain_commands(arguments: Sequence[str]) -> NoReturn:
    """``argosy --help``, or the complaint about a command that does not exist: no command's flags are looked at."""
    without_flags = [
        Annotated[
            make_dataclass(_identifier(name), (), namespace={"__doc__": command.options_class.__doc__}),
            _subcommand(name),
        ]
        for name, command in COMMANDS.items()
    ]
    any_command: Any = reduce(or_, without_flags)
    tyro.cli(any_command, prog="argosy", description=DESCRIPTION, args=list(arguments))
    raise SystemExit(EXIT_USER_ERROR)


def _identifier(name: str) -> str:
    """A command's name as the name of a field or a class: ``bench serve`` has two words."""
    return name.replace(" ", "_")


def _subcommand(name: str) -> object:
    return tyro.conf.subcommand(name)


def _build_arguments_class(name: str, command: Command) -> type:
    """The command's own flags, ``engine`` and ``sampling`` as nested dataclasses; tyro shows each as a group."""
    groups: list[tuple[str, type, Any]] = [(_identifier(name), build_flag_class(command.options_class), field())]
    if command.has_engine_flags:
        groups.append(("engine", build_flag_class(EngineConfig), field()))
        groups.append(("plan", build_flag_class(LoadPlanOptions), field()))
    if command.sampling_omits is not None:
        flags = build_flag_class(SamplingParams, omit=command.sampling_omits, defaults=SAMPLING_DEFAULTS)
        groups.append(("sampling", flags, field()))
    class_name = f"{command.options_class.__name__}Arguments"
    return make_dataclass(class_name, groups, frozen=True, namespace={"__doc__": command.options_class.__doc__})


def _build_invocation(
    command: Command, parsed: Any, arguments: tuple[str, ...], terminal: Terminal, build_llm: BuildLanguageModel
) -> Invocation:
    engine_config = build_config(EngineConfig, parsed.engine) if command.has_engine_flags else EngineConfig()
    sampling_params = SamplingParams()
    if command.sampling_omits is not None:
        sampling_params = build_config(SamplingParams, parsed.sampling, omit=command.sampling_omits)
    return Invocation(
        engine_config=engine_config,
        sampling_params=sampling_params,
        terminal=terminal,
        build_llm=build_llm,
        arguments=arguments,
    )


def _report_error(error: Exception, terminal: Terminal) -> int:
    """One line, and whose fault it was."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError):
        terminal.warn(f"error: {text}")
        return EXIT_USER_ERROR
    if isinstance(error, (RuntimeError, OSError)):
        terminal.warn(f"error: {text}")
        return EXIT_FAILED
    terminal.warn(f"internal error: {type(error).__name__}: {text} (a bug; --debug shows where)")
    return EXIT_FAILED
