"""``argosy validate --topologies``: shows the equality table of ``argosy.validation.topologies``, a row as it is done.

It judges nothing itself. Invariant: the exit code is 0 only if every cell passed and there was at least one.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from rich.table import Table

from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.config import EngineConfig

# Asked through the chat encoding, beside the random prompts: text that the model answers with confidence.
QUESTIONS = (
    "What is 17 + 25?",
    "What is the capital of France?",
    "12和30哪个大？",
    "Tom has 5 apples and buys 7 more. How many apples does he have?",
)
COLUMNS = ("high_throughput", "low_latency", "all_gather")
_NAME = re.compile(r"dp(\d+) ?tp(\d+)")


class WayLike(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def ep_mode(self) -> str: ...


class WayResultLike(Protocol):
    @property
    def way(self) -> WayLike: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_equal(self) -> int: ...

    @property
    def logprob_difference(self) -> float: ...

    @property
    def passed(self) -> bool: ...


class RowLike(Protocol):
    """One topology, as ``argosy.validation.topologies`` measures it."""

    @property
    def name(self) -> str: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def start_s(self) -> float: ...

    @property
    def ways(self) -> Sequence[WayResultLike]: ...

    @property
    def passed(self) -> bool: ...


CompareTopologies = Callable[[EngineConfig, Sequence[tuple[int, int]], int], Iterator[RowLike]]


def parse_topologies(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(dp_size, tp_size) of names such as ``dp2tp4``.

    Raises:
        ValueError: a name that is none.
    """
    matches = [_NAME.fullmatch(name) for name in names]
    for name, match in zip(names, matches, strict=True):
        if match is None:
            raise ValueError(f"--only takes topologies such as dp2tp4, got {name!r}")
    return tuple((int(match[1]), int(match[2])) for match in matches if match)


def run_equality_table(
    names: Sequence[str], greedy_tokens: int, invocation: Invocation, compare: CompareTopologies | None = None
) -> int:
    """``names``: of the topologies to run; none means all."""
    table = Table("topology", "ranks", "start, s", *COLUMNS, "largest logprob difference", "passed")
    rows = []
    for row in (compare or compare_topologies)(invocation.engine_config, parse_topologies(names), greedy_tokens):
        rows.append(row)
        invocation.terminal.say(f"{row.name}: {'passed' if row.passed else 'FAILED'}")
        difference = max((way.logprob_difference for way in row.ways), default=0.0)
        cells = [_cell([way for way in row.ways if way.way.ep_mode == mode]) for mode in COLUMNS]
        if row.num_ranks == 1:
            cells = [_cell(row.ways), "", ""]
        table.add_row(
            row.name,
            str(row.num_ranks),
            f"{row.start_s:.1f}",
            *cells,
            f"{difference:.1e}",
            "yes" if row.passed else "NO",
        )
    console = invocation.terminal.table_console()
    console.print(table)
    console.print(
        "A cell: ways (whole or chunked prefill, requests balanced or all on one replica) with all tokens equal to one "
        "rank's, and if not all have, the share of tokens before each request's first difference."
    )
    for row in rows:
        for way in row.ways:
            if not way.passed:
                console.print(f"{row.name}, {way.way.name}: {way.num_equal} of {way.num_tokens} tokens equal")
    num_passed = sum(row.passed for row in rows)
    console.print(f"{num_passed} of {len(rows)} topologies passed")
    return EXIT_OK if rows and num_passed == len(rows) else EXIT_FAILED


def _cell(ways: Sequence[WayResultLike]) -> str:
    """How many ways have all tokens equal, and if some have not, the share of tokens before the first difference."""
    counted = f"{sum(way.num_equal == way.num_tokens for way in ways)} of {len(ways)}"
    share = sum(way.num_equal for way in ways) / max(1, sum(way.num_tokens for way in ways))
    return counted if share == 1.0 else f"{counted} ({share:.0%})"


def compare_topologies(config: EngineConfig, sizes: Sequence[tuple[int, int]], greedy_tokens: int) -> Iterator[RowLike]:
    """The real rows."""
    # Imported here: they bring torch.
    from argosy.engine.build import resolve_model_directory
    from argosy.engine.tokenizer import Tokenizer
    from argosy.models.deepseek.encoding import encode_messages
    from argosy.validation.topologies import TOPOLOGIES, Topology, Workload
    from argosy.validation.topologies import compare_topologies as compare

    tokenizer = Tokenizer.from_directory(resolve_model_directory(config.tokenizer or config.model))
    rng = random.Random(config.seed)
    prompts = [rng.choices(range(tokenizer.vocab_size), k=length) for length in (200, 90, 70)]
    for question in QUESTIONS:
        prompts.append(tokenizer.encode(encode_messages([{"role": "user", "content": question}])))
    workload = Workload(prompts=prompts, num_tokens=greedy_tokens)
    return compare(config, workload, tuple(Topology(*size) for size in sizes) or TOPOLOGIES)
