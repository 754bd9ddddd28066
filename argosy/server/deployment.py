"""``GET /deployment``: what the console draws, for any other onlooker too. Gathered from the engines' last words.

Nothing is asked of an engine here, so looking costs no step anything. Counters only grow while an engine's process
lives; whoever wants a rate takes two answers and their ``time_s``. Invariant: ranks are numbered over all engines as
``ParallelLayout`` numbers them, and each is listed, whatever state its engine is in.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from argosy.distributed.layout import ParallelLayout
from argosy.engine.replica_messages import RankStats, ReplicaStats
from argosy.engine.step_times import StepTime
from argosy.messages import imbalance
from argosy.server.engine_messages import EngineDescription
from argosy.server.engine_seat import EngineStatus


class EngineSource(Protocol):
    """Of the pool, what is shown."""

    @property
    def engines(self) -> list[EngineStatus]: ...

    @property
    def description(self) -> EngineDescription: ...

    @property
    def dp_size(self) -> int: ...

    @property
    def num_replays(self) -> int: ...


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """The API process."""

    model: str
    version: str
    status: str  # "ready", or why no request is taken
    time_s: float  # time.monotonic of this machine, as all times here
    num_requests: int  # completions under way
    max_num_requests: int  # beyond: 503
    generation_tokens: int  # counters since the start
    num_replays: int  # requests that went on at another engine


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine process."""

    index: int
    state: str  # starting, ready, restarting, failed
    pid: int | None  # None: between two processes
    num_restarts: int
    in_state_s: float  # seconds since the state began
    last_message: str
    num_requests: int
    time_s: float | None  # when its counters were read; None: nothing was told yet


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's queue, cache and counters."""

    dp: int
    engine: int
    num_running: int
    num_waiting: int
    blocks_total: int  # each is used, cached (by a prefix alone) or blank
    blocks_used: int
    blocks_cached: int
    num_scheduled_tokens: int  # counters from here on: of prompts and outputs
    num_queried_tokens: int  # looked up in the prefix cache
    num_cached_tokens: int  # found there
    num_preemptions: int
    num_steps: int
    num_dummy_steps: int
    step_s: float
    coordination_s: float
    recent_steps: list[StepTime]  # [end_s, duration_s, num_tokens], oldest first


class RankView(msgspec.Struct, frozen=True, kw_only=True):
    """One rank: where it stands, and what it counted."""

    rank: int
    node: int
    local_rank: int
    engine: int
    dp: int
    tp: int
    ep: int
    is_leader: bool
    state: str  # its engine's
    pid: int | None  # None: not told yet
    num_restarts: int  # of its engine
    bytes_sent: dict[str, int] = {}  # by axis
    num_replays: int = 0  # of device graphs
    num_late_compilations: int = 0


class ExpertsView(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that each expert got since its engine started; a layer's copies of an expert are added up."""

    num_ep_ranks: int  # equal blocks of neighbouring experts
    tokens: list[list[int]]  # by MoE layer
    imbalance: list[float]  # by MoE layer: the busiest expert over the mean
    rank_imbalance: list[float]  # by MoE layer: the busiest ep rank over the mean


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer. Without ``description`` the engines are starting, and the lists are empty."""

    server: ServerView
    description: EngineDescription | None = None
    engines: list[EngineView] = []
    replicas: list[ReplicaView] = []
    ranks: list[RankView] = []
    experts: ExpertsView | None = None  # None: not asked for, or not every engine has told


def describe_deployment(server: ServerView, source: EngineSource | None, *, has_experts: bool) -> Deployment:
    """``source``: None while the engines start."""
    if source is None:
        return Deployment(server=server)
    description, engines = source.description, source.engines
    return Deployment(
        server=server,
        description=description,
        engines=[_view_engine(status) for status in engines],
        replicas=_view_replicas(engines, source.dp_size),
        ranks=_view_ranks(engines, description, source.dp_size),
        experts=_view_experts(engines, description.ep_size) if has_experts else None,
    )


def _view_engine(status: EngineStatus) -> EngineView:
    return EngineView(
        index=status.index,
        state=status.state,
        pid=status.pid,
        num_restarts=status.num_restarts,
        in_state_s=time.monotonic() - status.since_s,
        last_message=status.last_message,
        num_requests=status.num_requests,
        time_s=None if status.snapshot is None else status.snapshot.time_s,
    )


def _view_replicas(engines: Sequence[EngineStatus], dp_size: int) -> list[ReplicaView]:
    """Only of engines that have told."""
    num_inside = dp_size // len(engines)
    return [
        _view_replica(status.index * num_inside + i, status.index, replica)
        for status in engines
        for i, replica in enumerate(_replicas_of(status))
    ]


def _view_replica(dp_rank: int, engine: int, stats: ReplicaStats) -> ReplicaView:
    return ReplicaView(
        dp=dp_rank,
        engine=engine,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        blocks_total=stats.blocks_total,
        blocks_used=stats.blocks_used,
        blocks_cached=stats.blocks_cached,
        num_scheduled_tokens=stats.num_scheduled_tokens,
        num_queried_tokens=stats.num_queried_tokens,
        num_cached_tokens=stats.num_cached_tokens,
        num_preemptions=stats.num_preemptions,
        num_steps=stats.num_steps,
        num_dummy_steps=stats.num_dummy_steps,
        step_s=stats.step_s,
        coordination_s=stats.coordination_s,
        recent_steps=stats.recent_steps,
    )


def _view_ranks(engines: Sequence[EngineStatus], description: EngineDescription, dp_size: int) -> list[RankView]:
    layout = ParallelLayout(dp_size=dp_size, tp_size=description.tp_size, ep_size=description.ep_size)
    num_inside = layout.world_size // len(engines)
    num_a_node = layout.world_size // description.nnodes
    views = []
    for status in engines:
        told = {stats.rank: stats for replica in _replicas_of(status) for stats in replica.ranks}
        for inside in range(num_inside):
            rank = status.index * num_inside + inside
            place = divmod(rank, num_a_node)
            views.append(_view_rank(rank, place, layout, status, told.get(inside)))
    return views


def _view_rank(
    rank: int, place: tuple[int, int], layout: ParallelLayout, status: EngineStatus, stats: RankStats | None
) -> RankView:
    coords = layout.coords(rank)
    return RankView(
        rank=rank,
        node=place[0],
        local_rank=place[1],
        engine=status.index,
        dp=coords.dp,
        tp=coords.tp,
        ep=coords.ep,
        is_leader=layout.is_leader(rank),
        state=status.state,
        pid=None if stats is None else stats.pid,
        num_restarts=status.num_restarts,
        bytes_sent={} if stats is None else {axis: sum(each.values()) for axis, each in stats.bytes_sent.items()},
        num_replays=0 if stats is None else stats.num_replays,
        num_late_compilations=0 if stats is None else stats.num_late_compilations,
    )


def _view_experts(engines: Sequence[EngineStatus], num_ep_ranks: int) -> ExpertsView | None:
    """Of the engines that have told; one that is starting again has nothing to add yet."""
    snapshots = [status.snapshot for status in engines if status.snapshot is not None]
    summaries = [summary for each in snapshots if (summary := each.summarize_ranks(num_ep_ranks)) is not None]
    if not summaries:
        return None
    by_expert = _add_layers([summary.tokens_per_expert for summary in summaries])
    by_rank = _add_layers([summary.tokens_per_rank for summary in summaries])
    return ExpertsView(
        num_ep_ranks=num_ep_ranks,
        tokens=by_expert,
        imbalance=[imbalance(layer) for layer in by_expert],
        rank_imbalance=[imbalance(layer) for layer in by_rank],
    )


def _add_layers(engines: Sequence[list[list[int]]]) -> list[list[int]]:
    """Tokens by layer and expert, or by layer and ep rank, of engines that hold the same experts."""
    return [[sum(tokens) for tokens in zip(*layers, strict=True)] for layers in zip(*engines, strict=True)]


def _replicas_of(status: EngineStatus) -> list[ReplicaStats]:
    return [] if status.snapshot is None else status.snapshot.replicas
