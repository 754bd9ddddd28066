"""Arithmetic of the load generator."""

import itertools
import math
import random
import statistics

import pytest

from argosy.cli.bench_serve import BenchServeOptions, read_limits
from argosy.loadtest.records import RequestRecord, percentile, summarize
from argosy.loadtest.workload import arrival_gaps_s, draw_requests


def record(sent_s: float, times_s: list[float], num_tokens: int, error: str | None = None) -> RequestRecord:
    ended_s = times_s[-1] if times_s else sent_s + 0.3
    return RequestRecord(7, sent_s, times_s, ended_s, num_tokens, 200, error)


def test_metrics_of_one_request() -> None:
    one = record(1.0, [1.5, 1.6, 1.9], 5)
    assert one.times_ms("ttft") == pytest.approx([500.0])
    assert one.times_ms("tpot") == pytest.approx([100.0])  # four steps in 0.4 s, whatever the events
    assert one.times_ms("itl") == pytest.approx([100.0, 300.0])
    assert one.times_ms("e2el") == pytest.approx([900.0])


def test_a_run() -> None:
    records = [
        record(0.0, [0.1, 0.2], 2),
        record(0.1, [0.5, 0.6], 2),
        record(0.1, [], 0, "HTTP 503"),
        record(0.3, [], 0),
    ]
    report = summarize(records, 2.0, (50, 100), {"ttft": 200.0})
    assert (report.num_completed, report.errors) == (2, {"HTTP 503": 1, "no text came": 1})
    assert report.request_throughput == 1.0 and report.output_throughput == 2.0
    assert report.total_throughput == (4 + 14) / 2.0
    assert report.goodput == 0.5  # only the first came in time
    assert report.summaries["ttft"].percentiles == pytest.approx({50: 250.0, 100: 400.0})
    assert report.peak_concurrency == 3


def test_percentiles_are_those_of_the_standard_library() -> None:
    rng = random.Random(0)
    values = sorted(rng.random() for _ in range(101))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert [percentile(values, percent) for percent in range(1, 100)] == pytest.approx(cuts)


def test_arrivals_keep_the_rate() -> None:
    for burstiness in (0.5, 1.0, 4.0):
        gaps = list(itertools.islice(arrival_gaps_s(random.Random(0), 20.0, burstiness), 20_000))
        assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
        assert statistics.pvariance(gaps) == pytest.approx(1 / (400 * burstiness), rel=0.1)
    assert list(itertools.islice(arrival_gaps_s(random.Random(0), math.inf, 1.0), 3)) == [0.0] * 3


def test_prompts_are_drawn_from_the_seed_and_share_nothing() -> None:
    first, again = (draw_requests(random.Random(3), 50, 20, 8, 0.5) for _ in range(2))
    assert first == again and len({request.prompt.split()[0] for request in first}) == 50
    lengths = {len(request.prompt.split()) for request in first}
    assert min(lengths) >= 10 and max(lengths) <= 30 and len(lengths) > 5
    assert {request.num_output_tokens for request in first} <= set(range(4, 13))


def test_limits() -> None:
    assert read_limits(("ttft:200", "e2el:1.5")) == {"ttft": 200.0, "e2el": 1.5}
    for bad in ("ttft", "ttft:x", "ttft:-1", "speed:1", "ttft:nan"):
        with pytest.raises(ValueError, match="goodput"):
            read_limits((bad,))


@pytest.mark.parametrize(
    "bad",
    [
        {"num_prompts": 0},
        {"request_rate": 0.0},
        {"request_rate": math.nan},
        {"burstiness": 0.0},
        {"random_range_ratio": 1.0},
        {"metric_percentiles": ()},
        {"metric_percentiles": (101.0,)},
        {"base_url": "localhost:8000"},
        {"max_concurrency": 0},
    ],
)
def test_bad_options(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(bad)).replace('_', '-')}"):
        BenchServeOptions(**bad)
