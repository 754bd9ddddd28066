"""``argosy validate``: runs the oracle gates of ``argosy.validation`` on a checkpoint and shows them as a table.

With ``--topologies`` it shows the equality table instead (``equality_table.py``).

It judges nothing itself. Invariant: the exit code is 0 only if every gate passed and there was at least one.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from rich.table import Table

from argosy.cli.equality_table import TableOptions, check_formats, parse_topologies, run_equality_table
from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.config import EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateOptions:
    """Compare a checkpoint's computation with transformers, or every topology's tokens with one rank's."""

    prompt_tokens: tuple[int, ...] = (200, 90, 33)  # random prompts; past index_topk, attention is sparse
    greedy_tokens: tuple[int, ...] = (20, 200)  # greedy continuations to compare, in tokens
    topologies: bool = False  # start every topology and compare its greedy tokens (the first number) with one rank's
    only: tuple[str, ...] = ()  # topologies to start, dp2tp4 say; none = all of the table
    formats: tuple[str, ...] = ("stored", "w8a8", "int8_cache")  # number formats of the table; fp8_cache is another
    debug: bool = False  # show tracebacks

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "greedy_tokens"):
            lengths = getattr(self, name)
            if not lengths or min(lengths) < 1:
                raise ValueError(f"{name} must be positive, got {lengths}; set --{name.replace('_', '-')} 20 200, say")
        if self.only and not self.topologies:
            raise ValueError(f"--only {' '.join(self.only)} names topologies; add --topologies")
        parse_topologies(self.only)
        check_formats(self.formats)


class GateResult(Protocol):
    """One line of the table, as ``argosy.validation`` measures it. A None threshold is only reported."""

    @property
    def name(self) -> str: ...

    @property
    def measured(self) -> float: ...

    @property
    def threshold(self) -> float | None: ...

    @property
    def passed(self) -> bool: ...

    @property
    def detail(self) -> str: ...


RunGates = Callable[[EngineConfig, ValidateOptions], Iterable[GateResult]]


def run_validate(options: ValidateOptions, invocation: Invocation, run_gates: RunGates | None = None) -> int:
    if options.topologies:
        table_options = TableOptions(
            topologies=options.only, formats=options.formats, greedy_tokens=options.greedy_tokens[0]
        )
        return run_equality_table(table_options, invocation)
    results = list((run_gates or run_oracle_gates)(invocation.engine_config, options))
    table = Table("gate", "measured", "threshold", "passed", "detail")
    for result in results:
        threshold = "reported" if result.threshold is None else f"{result.threshold:g}"
        table.add_row(result.name, f"{result.measured:.6g}", threshold, "yes" if result.passed else "NO", result.detail)
    console = invocation.terminal.table_console()
    console.print(table)
    num_failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - num_failed} of {len(results)} gates passed")
    return EXIT_OK if results and not num_failed else EXIT_FAILED


def run_oracle_gates(config: EngineConfig, options: ValidateOptions) -> Iterable[GateResult]:
    """The real gates.

    Raises:
        RuntimeError: ``transformers`` is not installed.
    """
    # Imported here: they bring torch, and transformers, which only this command needs.
    import torch

    from argosy.engine.build import build_engine
    from argosy.engine.model_directory import resolve_model_directory
    from argosy.validation.gates import GateInputs, run_gates
    from argosy.validation.oracle import Oracle

    engine = build_engine(config)
    oracle = Oracle(resolve_model_directory(config.model), getattr(torch, engine.config.dtype))
    rng = random.Random(config.seed)
    lengths = sorted(options.prompt_tokens, reverse=True)
    prompts = [rng.choices(range(engine.tokenizer.vocab_size), k=length) for length in lengths]
    inputs = GateInputs(engine=engine, oracle=oracle, prompts=prompts)
    return run_gates(inputs, greedy_lengths=options.greedy_tokens)
