"""``argosy validate --topologies``: shows the equality table of ``argosy.validation.topologies``, a row as it is done.

It judges nothing itself. Invariant: the exit code is 0 only if every cell passed and there was at least one.
"""

import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
FORMATS = (
    "stored",
    "w8a8",
    "int8_cache",
    "fp8_cache",
    "fp8_index_keys",
)  # as ``argosy.validation.number_formats`` has them
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
    def largest_gap(self) -> float: ...

    @property
    def passed(self) -> bool: ...


class RowLike(Protocol):
    """One topology, as ``argosy.validation.topologies`` measures it."""

    @property
    def name(self) -> str: ...

    @property
    def number_format(self) -> str: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def start_s(self) -> float: ...

    @property
    def ways(self) -> Sequence[WayResultLike]: ...

    @property
    def passed(self) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TableOptions:
    """What the table holds."""

    topologies: Sequence[str]  # names such as dp2tp4; none means all
    formats: Sequence[str]
    greedy_tokens: int


CompareTopologies = Callable[[EngineConfig, TableOptions], Iterator[RowLike]]


def check_formats(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no format's, and for none."""
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise ValueError(f"--formats takes some of {', '.join(FORMATS)}, got {' '.join(unknown) or 'none'}")


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


def run_equality_table(options: TableOptions, invocation: Invocation, compare: CompareTopologies | None = None) -> int:
    table = Table("format", "topology", "ranks", "start, s", *COLUMNS, "logprob difference", "gap", "passed")
    rows = []
    for row in (compare or compare_topologies)(invocation.engine_config, options):
        rows.append(row)
        invocation.terminal.say(f"{row.number_format}, {row.name}: {'passed' if row.passed else 'FAILED'}")
        difference = max((way.logprob_difference for way in row.ways), default=0.0)
        gap = max((way.largest_gap for way in row.ways), default=0.0)
        cells = [_cell([way for way in row.ways if way.way.ep_mode == mode]) for mode in COLUMNS]
        if row.num_ranks == 1:
            cells = [_cell(row.ways), "", ""]
        table.add_row(
            row.number_format,
            row.name,
            str(row.num_ranks),
            f"{row.start_s:.1f}",
            *cells,
            f"{difference:.1e}",
            f"{gap:.2g}" if gap else "",
            "yes" if row.passed else "NO",
        )
    console = invocation.terminal.table_console()
    console.print(table)
    console.print(
        "A cell: ways (whole or chunked prefill, requests balanced or all on one replica, once with asynchronous "
        "scheduling, and some again with recorded decode steps) with all tokens equal to those of one rank in the same "
        "format, and if not all have, the share of tokens before a request's first difference. Gap: how much less "
        "likely (log) one rank found the token that came instead; near 0 it was a tie. Differences are the largest of "
        "a row."
    )
    for row in rows:
        for way in row.ways:
            if not way.passed:
                equal = f"{way.num_equal} of {way.num_tokens} tokens equal"
                console.print(f"{row.number_format}, {row.name}, {way.way.name}: {equal}")
    num_passed = sum(row.passed for row in rows)
    console.print(f"{num_passed} of {len(rows)} rows passed")
    return EXIT_OK if rows and num_passed == len(rows) else EXIT_FAILED


def _cell(ways: Sequence[WayResultLike]) -> str:
    """How many ways have all tokens equal, and if some have not, the share of tokens before the first difference."""
    counted = f"{sum(way.num_equal == way.num_tokens for way in ways)} of {len(ways)}"
    share = sum(way.num_equal for way in ways) / max(1, sum(way.num_tokens for way in ways))
    return counted if share == 1.0 else f"{counted} ({share:.0%})"


def compare_topologies(config: EngineConfig, options: TableOptions) -> Iterator[RowLike]:
    """The real rows."""
    # Imported here: they bring torch.
    from argosy.engine.model_directory import resolve_model_directory
    from argosy.engine.tokenizer import Tokenizer
    from argosy.models.deepseek.encoding import encode_messages
    from argosy.validation.number_formats import build_number_format
    from argosy.validation.topologies import TOPOLOGIES, Topology, Workload
    from argosy.validation.topologies import compare_topologies as compare

    tokenizer = Tokenizer.from_directory(resolve_model_directory(config.tokenizer or config.model))
    rng = random.Random(config.seed)
    prompts = [rng.choices(range(tokenizer.vocab_size), k=length) for length in (200, 90, 70)]
    for question in QUESTIONS:
        prompts.append(tokenizer.encode(encode_messages([{"role": "user", "content": question}])))
    workload = Workload(prompts=prompts, num_tokens=options.greedy_tokens)
    topologies = tuple(Topology(*sizes) for sizes in parse_topologies(options.topologies)) or TOPOLOGIES
    with tempfile.TemporaryDirectory(prefix="argosy-") as scratch:
        for name in options.formats:
            yield from compare(build_number_format(name, config, Path(scratch)), workload, topologies)
