"""Engines to look at without running any: what a pool would say of them, made from sizes and a seed."""

import random
import time
from dataclasses import dataclass, field

from argosy.engine.replica_messages import RankStats, ReplicaStats
from argosy.engine.step_times import StepTime
from argosy.server.engine_messages import EngineDescription, EngineSnapshot
from argosy.server.engine_seat import EngineState, EngineStatus


@dataclass(kw_only=True)
class PlayedEngines:
    """``EngineSource``. ``num_engines`` share the replicas in order; ``ep_size`` counts ranks of one engine."""

    dp_size: int = 2
    tp_size: int = 2
    ep_size: int = 4
    num_engines: int = 1
    nnodes: int = 1
    num_layers: int = 3
    num_experts: int = 16
    states: dict[int, EngineState] = field(default_factory=dict)  # by engine, where it is not ready
    num_replays: int = 0

    def __post_init__(self) -> None:
        self.started_s = time.monotonic()
        num_local = self.num_experts // self.ep_size
        numbers = random.Random(7)
        world_size = self.dp_size * self.tp_size
        self.loads = [
            [[int(900 * numbers.lognormvariate(0, 0.5)) for _ in range(num_local)] for _ in range(self.num_layers)]
            for _ in range(world_size)
        ]  # by rank, layer and local expert
        self.steps = [[numbers.uniform(0.018, 0.024) for _ in range(96)] for _ in range(self.dp_size)]

    @property
    def description(self) -> EngineDescription:
        return EngineDescription(
            max_model_len=131072,
            vocab_size=128815,
            num_blocks=2049,
            block_size=64,
            device_name="a played device",
            dtype="bfloat16",
            number_format="bfloat16, w8a8",
            dp_size=self.dp_size // self.num_engines,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            start_s=61.0,
            nnodes=self.nnodes,
        )

    @property
    def engines(self) -> list[EngineStatus]:
        return [self._engine(index) for index in range(self.num_engines)]

    def _engine(self, index: int) -> EngineStatus:
        state = self.states.get(index, "ready")
        is_ready = state == "ready"
        num_inside = self.dp_size // self.num_engines
        replicas = [self._replica(index * num_inside + i, i) for i in range(num_inside)]
        return EngineStatus(
            index=index,
            state=state,
            pid=4000 + index if is_ready else None,
            num_restarts=0 if is_ready else 1,
            since_s=self.started_s,
            last_message="ready after 61.0 s" if is_ready else f"engine {index} (pid {4000 + index}) died",
            snapshot=EngineSnapshot(time.monotonic(), 0, True, replicas) if is_ready else None,
            num_requests=3,
        )

    def _replica(self, dp_rank: int, place: int) -> ReplicaStats:
        """``place``: inside its engine."""
        seconds = time.monotonic() - self.started_s
        firsts = dp_rank * self.tp_size, place * self.tp_size
        ranks = [
            RankStats(
                firsts[1] + i,
                {"ep": {"all_to_all": 10**9}, "tp": {}},
                self.loads[firsts[0] + i],
                pid=5000 + firsts[0] + i,
            )
            for i in range(self.tp_size)
        ]
        steps = [StepTime(seconds + i, each, i % 5 and 40 + i) for i, each in enumerate(self.steps[dp_rank])]
        return ReplicaStats(
            num_steps=1000,
            num_dummy_steps=20,
            num_scheduled_tokens=int(1000 * seconds),
            num_preemptions=2,
            num_agreements=1000,
            coordination_s=0.1,
            ranks=ranks,
            num_running=12 + dp_rank,
            num_waiting=dp_rank,
            blocks_total=2048,
            blocks_used=512 + 100 * dp_rank,
            blocks_cached=700,
            num_queried_tokens=4000,
            num_cached_tokens=1000,
            step_s=20.0,
            recent_steps=steps,
        )
