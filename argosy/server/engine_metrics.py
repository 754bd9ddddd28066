"""What engines tell of themselves, as metrics: read from their last snapshots when somebody scrapes.

Counters are an engine process's own and start at 0 with a new one, as Prometheus expects of a restart. Invariant:
labels are engines, axes, layers and states: bounded by the deployment.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from argosy.engine.step_times import STEP_BOUNDS_S
from argosy.messages import DeploymentStats, imbalance
from argosy.server.engine_messages import EngineDescription, EngineSnapshot
from argosy.server.engine_seat import EngineStatus
from argosy.server.metrics import PREFIX, cumulate

Spec = tuple[tuple[str, tuple[str, ...], str], ...]

_WINDOW_S = 60.0  # imbalance is that of about so long
_SAMPLES = 6  # of the window
_AXES = {"leaders": "dp"}  # the leaders of replicas agree on steps: that is what data parallelism says

# (name, labels beside model_name, what it is); a name that vLLM has is vLLM's.
_GAUGES: Spec = (
    ("engine_up", ("engine",), "1 while the engine takes requests"),
    ("engine_requests", ("engine",), "Unfinished requests that the engine has been given"),
    ("engine_ranks", ("engine",), "Processes that compute, over which communication is added up"),
    ("engine_resident_memory_bytes", ("engine",), "Host memory of the engine's first process"),
    ("num_requests_running", ("engine",), "Requests that the next step goes on with"),
    ("num_requests_waiting", ("engine",), "Requests in the engine's queue"),
    ("kv_cache_usage_perc", ("engine",), "Cache blocks that requests hold: 1 is all"),
    ("cache_blocks", ("engine", "state"), "Blocks by state: used, cached (free, with a prefix to reuse) and blank"),
    ("cache_config_info", ("engine", "block_size", "num_gpu_blocks", "number_format"), "How the cache is cut: 1"),
    ("expert_imbalance", ("engine", "layer"), "Tokens of a MoE layer's busiest expert by the mean, of a minute"),
    ("rank_imbalance", ("engine", "layer"), "Tokens of the rank with the busiest experts by the mean, of a minute"),
    ("replica_imbalance", ("engine",), "Tokens of the busiest replica by the mean"),
)
_COUNTERS: Spec = (
    ("engine_restarts", ("engine",), "Times that the engine was started again"),
    ("request_replays", (), "Requests that went on at another engine, behind the tokens already told"),
    ("engine_cpu_seconds", ("engine",), "Processor time of the engine's first process"),
    ("num_preemptions", ("engine",), "Requests that gave their blocks to older ones"),
    ("prefix_cache_queries", ("engine",), "Tokens looked up in the prefix cache"),
    ("prefix_cache_hits", ("engine",), "Tokens found there"),
    ("engine_steps", ("engine",), "Steps with work, of all replicas"),
    ("engine_dummy_steps", ("engine",), "Steps without, for the sake of the other replicas"),
    ("engine_tokens", ("engine",), "Tokens computed in steps"),
    ("engine_coordination_seconds", ("engine",), "Agreeing on steps, waiting for slower replicas included"),
    ("engine_graph_replays", ("engine",), "Steps from device graphs, of all ranks"),
    ("engine_late_compilations", ("engine",), "Kernels that were compiled while requests could wait for them"),
    ("communication_bytes", ("engine", "axis"), "Sent to other ranks, of all ranks"),
    ("communication_seconds", ("engine", "axis"), "Hosts starting and awaiting collectives, of all ranks"),
)
_HISTOGRAMS: Spec = (("engine_step_seconds", ("engine",), "Duration of a step with work"),)
_SNAPSHOT_COUNTERS = (
    ("num_preemptions", "num_preemptions"),
    ("prefix_cache_queries", "prefix_cache_queries"),
    ("prefix_cache_hits", "prefix_cache_hits"),
    ("engine_steps", "num_steps"),
    ("engine_dummy_steps", "num_dummy_steps"),
    ("engine_tokens", "num_scheduled_tokens"),
    ("engine_coordination_seconds", "coordination_s"),
)


class WatchedPool(Protocol):
    """Of the pool, what metrics read."""

    @property
    def engines(self) -> list[EngineStatus]: ...

    @property
    def description(self) -> EngineDescription: ...

    @property
    def num_replays(self) -> int: ...


class EngineMetrics(Collector):
    """All engines of a pool."""

    def __init__(self, model: str, pool: WatchedPool) -> None:
        self._model = model
        self._pool = pool
        self._loads: dict[int, RecentLoad] = {}

    def collect(self) -> Iterable[Metric]:
        families = _Families(self._model)
        families.add("request_replays", (), self._pool.num_replays)
        for status in self._pool.engines:
            engine = (str(status.index),)
            families.add("engine_up", engine, float(status.state == "ready"))
            families.add("engine_restarts", engine, status.num_restarts)
            families.add("engine_requests", engine, status.num_requests)
            if status.pid is not None:
                _read_process(families, status.pid, engine)
            if status.snapshot is not None:
                self._read_snapshot(families, status.snapshot, status.index)
        return families.all()

    def _read_snapshot(self, families: "_Families", snapshot: EngineSnapshot, index: int) -> None:
        engine, cache = (str(index),), self._pool.description
        families.add("num_requests_running", engine, snapshot.num_running)
        families.add("num_requests_waiting", engine, snapshot.num_waiting)
        families.add("kv_cache_usage_perc", engine, snapshot.blocks_used / max(1, snapshot.blocks_total))
        blank = snapshot.blocks_total - snapshot.blocks_used - snapshot.blocks_cached
        for state, count in (("used", snapshot.blocks_used), ("cached", snapshot.blocks_cached), ("blank", blank)):
            families.add("cache_blocks", (*engine, state), count)
        sizes = (str(cache.block_size), str(cache.num_blocks), cache.number_format)
        families.add("cache_config_info", (*engine, *sizes), 1)
        for name, attribute in _SNAPSHOT_COUNTERS:
            families.add(name, engine, getattr(snapshot, attribute))
        families.add_histogram("engine_step_seconds", engine, snapshot.steps_by_duration, snapshot.step_s)
        ranks = snapshot.summarize_ranks(cache.ep_size)
        if ranks is not None:
            families.add("engine_graph_replays", engine, snapshot.num_graph_replays)
            self._read_ranks(families, ranks, index)

    def _read_ranks(self, families: "_Families", ranks: DeploymentStats, index: int) -> None:
        engine = (str(index),)
        families.add("engine_ranks", engine, ranks.num_ranks)
        families.add("engine_late_compilations", engine, ranks.num_late_compilations)
        families.add("replica_imbalance", engine, ranks.replica_imbalance)
        for axis, num_bytes in ranks.bytes_sent.items():
            families.add("communication_bytes", (*engine, _AXES.get(axis, axis)), num_bytes)
        for axis, seconds in ranks.communication_s.items():
            families.add("communication_seconds", (*engine, _AXES.get(axis, axis)), seconds)
        load = self._loads.setdefault(index, RecentLoad())
        load.take(time.monotonic(), ranks.tokens_per_expert, ranks.tokens_per_rank)
        for layer, (experts, by_rank) in enumerate(zip(load.tokens_per_expert, load.tokens_per_rank, strict=True)):
            families.add("expert_imbalance", (*engine, str(layer)), imbalance(experts))
            families.add("rank_imbalance", (*engine, str(layer)), imbalance(by_rank))


class LoadSample(NamedTuple):
    """Counters as they were: by layer, then by expert or rank."""

    time_s: float
    tokens_per_expert: list[list[int]]
    tokens_per_rank: list[list[int]]


class RecentLoad:
    """How many tokens experts and ranks got in about the last minute; since the engine's start, until that is over.

    What is even over a day may be uneven in every minute of it.
    """

    def __init__(self) -> None:
        self.tokens_per_expert: list[list[int]] = []
        self.tokens_per_rank: list[list[int]] = []
        self._samples: deque[LoadSample] = deque()  # oldest first; the first may be older than the window

    def take(self, now_s: float, tokens_per_expert: list[list[int]], tokens_per_rank: list[list[int]]) -> None:
        """Counters since the engine's start, which only grow while it is the same engine."""
        samples = self._samples
        if samples and _total(tokens_per_expert) < _total(samples[-1].tokens_per_expert):
            samples.clear()
        while len(samples) > 1 and samples[1].time_s <= now_s - _WINDOW_S:
            samples.popleft()
        self.tokens_per_expert = _subtract(tokens_per_expert, samples[0].tokens_per_expert if samples else [])
        self.tokens_per_rank = _subtract(tokens_per_rank, samples[0].tokens_per_rank if samples else [])
        if not samples or now_s - samples[-1].time_s >= _WINDOW_S / _SAMPLES:
            samples.append(LoadSample(now_s, tokens_per_expert, tokens_per_rank))


class _Families:
    """Metrics by name, while they are filled."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        self._histograms: dict[str, HistogramMetricFamily] = {}
        for name, labels, text in _GAUGES:
            self._families[name] = GaugeMetricFamily(PREFIX + name, text, labels=("model_name", *labels))
        for name, labels, text in _COUNTERS:
            self._families[name] = CounterMetricFamily(PREFIX + name, text, labels=("model_name", *labels))
        for name, labels, text in _HISTOGRAMS:
            self._histograms[name] = HistogramMetricFamily(PREFIX + name, text, labels=("model_name", *labels))

    def add(self, name: str, labels: tuple[str, ...], value: float) -> None:
        self._families[name].add_metric((self._model, *labels), value)

    def add_histogram(self, name: str, labels: tuple[str, ...], counts: Sequence[int], total: float) -> None:
        if counts:
            buckets = cumulate(STEP_BOUNDS_S, counts)
            self._histograms[name].add_metric((self._model, *labels), buckets=buckets, sum_value=total)

    def all(self) -> Iterable[Metric]:
        return [*self._families.values(), *self._histograms.values()]


def _read_process(families: _Families, pid: int, engine: tuple[str, ...]) -> None:
    for metric in ProcessCollector(pid=lambda: pid, registry=None).collect():
        name = metric.name.replace("process_", "engine_", 1)
        if name in ("engine_cpu_seconds", "engine_resident_memory_bytes"):
            families.add(name, engine, metric.samples[0].value)


def _total(counts: Sequence[Sequence[int]]) -> int:
    return sum(map(sum, counts))


def _subtract(counts: list[list[int]], before: list[list[int]]) -> list[list[int]]:
    if not before:
        return counts
    return [[now - then for now, then in zip(*layers, strict=True)] for layers in zip(counts, before, strict=True)]
