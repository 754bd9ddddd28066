"""What engines tell of themselves, as gauges and counters for ``/metrics``."""

from collections.abc import Iterator

from argosy.server.engine_messages import EngineSnapshot
from argosy.server.engine_pool import EnginePool

Sample = tuple[str, str, dict[str, str], float]
_COUNTERS = (
    ("num_preemptions", "num_preemptions"),
    ("prefix_cache_queries", "prefix_cache_queries"),
    ("prefix_cache_hits", "prefix_cache_hits"),
    ("engine_steps", "num_steps"),
    ("engine_dummy_steps", "num_dummy_steps"),
    ("engine_tokens", "num_scheduled_tokens"),
    ("engine_step_seconds", "step_s"),
    ("engine_coordination_seconds", "coordination_s"),
)


def read_engines(pool: EnginePool) -> list[Sample]:
    """``(kind, name, labels, value)``; names that vLLM has are vLLM's."""
    samples: list[Sample] = []
    num_ep_ranks = pool.description.ep_size
    for status in pool.engines:
        engine = {"engine": str(status.index)}
        samples.append(("gauge", "engine_up", engine, float(status.state == "ready")))
        samples.append(("counter", "engine_restarts", engine, status.num_restarts))
        samples.append(("gauge", "engine_requests", engine, status.num_requests))
        if status.snapshot is not None:
            samples += _read_snapshot(status.snapshot, engine, num_ep_ranks)
    return samples


def _read_snapshot(snapshot: EngineSnapshot, engine: dict[str, str], num_ep_ranks: int) -> Iterator[Sample]:
    yield "gauge", "num_requests_running", engine, snapshot.num_running
    yield "gauge", "num_requests_waiting", engine, snapshot.num_waiting
    yield "gauge", "kv_cache_usage_perc", engine, snapshot.blocks_used / max(1, snapshot.blocks_total)
    blank = snapshot.blocks_total - snapshot.blocks_used - snapshot.blocks_cached
    for state, value in (("used", snapshot.blocks_used), ("cached", snapshot.blocks_cached), ("blank", blank)):
        yield "gauge", "cache_blocks", engine | {"state": state}, value
    for name, attribute in _COUNTERS:
        yield "counter", name, engine, getattr(snapshot, attribute)
    ranks = snapshot.summarize_ranks(num_ep_ranks)
    if ranks is None:
        return
    for axis, num_bytes in ranks.bytes_sent.items():
        yield "counter", "bytes_sent", engine | {"axis": axis}, num_bytes
    yield "gauge", "expert_imbalance", engine, ranks.expert_imbalance
    yield "gauge", "rank_imbalance", engine, ranks.rank_imbalance
    yield "gauge", "replica_imbalance", engine, ranks.replica_imbalance
