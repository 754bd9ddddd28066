"""Kernels that are compiled while requests wait are counted, and each kind is reported once."""

from argosy.engine.deployment_stats import summarize_stats
from argosy.engine.replica_messages import RankStats, ReplicaStats
from argosy.kernels.compilations import LateCompilations, NoCompilations
from argosy.kernels.select import select_compilation_counter


def test_nothing_counts_before_the_start_is_over() -> None:
    lines: list[str] = []
    counter = LateCompilations(lines.append)
    counter.observe("norm", "i32")
    assert (counter.num_compilations, lines) == (0, [])
    counter.start_counting()
    counter.observe("norm", "i32")
    assert counter.num_compilations == 1
    assert len(lines) == 1 and "norm" in lines[0] and "i32" in lines[0]


def test_every_compilation_counts_and_each_kind_is_reported_once() -> None:
    lines: list[str] = []
    counter = LateCompilations(lines.append)
    counter.start_counting()
    for kernel, arguments in (("norm", "i32"), ("norm", "i32"), ("norm", "i64"), ("topk", "i32")):
        counter.observe(kernel, arguments)
    assert (counter.num_compilations, len(lines)) == (4, 3)


def test_a_cpu_compiles_nothing() -> None:
    lines: list[str] = []
    counter = select_compilation_counter("cpu", lines.append)
    assert isinstance(counter, NoCompilations) and not counter.is_needed
    counter.start_counting()
    assert (counter.num_compilations, lines) == (0, [])


def test_the_deployment_adds_up_its_ranks() -> None:
    ranks = [RankStats(rank, {}, num_late_compilations=number) for rank, number in enumerate((2, 0, 3))]
    replica = ReplicaStats(1, 0, 1, 0, 1, 0.0, ranks)
    assert summarize_stats([replica], 3).num_late_compilations == 5
