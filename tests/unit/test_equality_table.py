"""The equality table as a user sees it: what is shown, and when it fails. Rows are made by hand."""

import dataclasses
import io
from collections.abc import Iterator

import pytest

from argosy.cli.equality_table import FORMATS, TableOptions, parse_topologies, run_equality_table
from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.cli.terminal import Terminal
from argosy.cli.validate import ValidateOptions
from argosy.config import EngineConfig
from argosy.sampling_params import SamplingParams
from argosy.validation.number_formats import NAMES, ROUNDINGS, SUMS, Tolerance
from argosy.validation.topologies import Topology, TopologyResult, Way, WayResult


def result(
    *, num_equal: int = 60, difference: float = 1e-6, median: float = 0.0, gap: float = 0.0, tolerance: Tolerance = SUMS
) -> WayResult:
    return WayResult(
        way=Way("low_latency", True, False),
        num_tokens=60,
        num_equal=num_equal,
        logprob_difference=difference,
        median_difference=median,
        largest_gap=gap,
        tolerance=tolerance,
    )


def row(*ways: WayResult) -> TopologyResult:
    return TopologyResult(topology=Topology(2, 4), number_format="w8a8", start_s=1.5, ways=list(ways))


def show(*rows: TopologyResult) -> tuple[int, str]:
    stdout = io.StringIO()
    terminal = Terminal(stdin=io.StringIO(), stdout=stdout, stderr=io.StringIO())

    def give_rows(config: EngineConfig, options: TableOptions) -> Iterator[TopologyResult]:
        return iter(rows)

    invocation = Invocation(
        engine_config=EngineConfig(),
        sampling_params=SamplingParams(),
        terminal=terminal,
        build_llm=lambda config: 1 / 0,
    )
    options = TableOptions(topologies=(), formats=FORMATS, greedy_tokens=20)
    return run_equality_table(options, invocation, give_rows), stdout.getvalue()


def test_table_of_equal_tokens_passes() -> None:
    exit_code, shown = show(row(result(), result()))
    assert exit_code == EXIT_OK
    assert "dp2 tp4" in shown and "2 of 2" in shown and "1 of 1 rows passed" in shown


def test_one_different_token_fails_and_is_named() -> None:
    exit_code, shown = show(row(result(), result(num_equal=59)))
    assert exit_code == EXIT_FAILED
    assert "w8a8, dp2 tp4, low_latency, chunked, all on one replica: 59 of 60 tokens equal" in shown.replace("\n", " ")


def test_logprobs_too_far_apart_fail_although_tokens_are_equal() -> None:
    assert show(row(result(difference=1e-3)))[0] == EXIT_FAILED
    assert show(row(result(difference=1e-3, tolerance=ROUNDINGS)))[0] == EXIT_OK


def test_a_token_may_change_at_a_tie_where_the_format_rounds() -> None:
    assert show(row(result(num_equal=59, gap=0.1, tolerance=ROUNDINGS)))[0] == EXIT_OK
    assert show(row(result(num_equal=59, gap=1.1, tolerance=ROUNDINGS)))[0] == EXIT_FAILED
    assert show(row(result(num_equal=47, gap=0.1, tolerance=ROUNDINGS)))[0] == EXIT_FAILED
    assert show(row(result(num_equal=59, gap=0.0001)))[0] == EXIT_FAILED


def test_one_token_may_be_far_off_where_the_format_rounds_but_not_half_of_them() -> None:
    assert show(row(result(difference=0.8, median=0.01, tolerance=ROUNDINGS)))[0] == EXIT_OK
    assert show(row(result(difference=0.8, median=0.03, tolerance=ROUNDINGS)))[0] == EXIT_FAILED
    assert show(row(result(difference=1.1, median=0.01, tolerance=ROUNDINGS)))[0] == EXIT_FAILED


def test_formats_are_those_that_can_be_built() -> None:
    assert FORMATS == NAMES
    with pytest.raises(
        ValueError, match="--formats takes some of stored, w8a8, int8_cache, fp8_cache, fp8_index_keys, got int4"
    ):
        ValidateOptions(topologies=True, formats=("stored", "int4"))


def test_a_recorded_way_that_replayed_nothing_is_no_success() -> None:
    recorded = dataclasses.replace(result(), way=Way("low_latency", True, True, is_recorded=True))
    exit_code, shown = show(row(recorded))
    assert exit_code == EXIT_FAILED and "low_latency, chunked, balanced, recorded: 60 of 60" in shown.replace("\n", " ")
    assert show(row(dataclasses.replace(recorded, num_replays=1)))[0] == EXIT_OK


def test_nothing_compared_is_no_success() -> None:
    assert show()[0] == EXIT_FAILED
    assert show(row())[0] == EXIT_FAILED


def test_topologies_are_read_from_their_names() -> None:
    assert parse_topologies(("dp2tp4", "dp16 tp1")) == ((2, 4), (16, 1))
    with pytest.raises(ValueError, match="--only takes topologies such as dp2tp4, got 'tp2'"):
        ValidateOptions(topologies=True, only=("tp2",))
    with pytest.raises(ValueError, match="add --topologies"):
        ValidateOptions(only=("dp2tp1",))
