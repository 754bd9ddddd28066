"""Which engines a server starts for one ``EngineConfig``: one a replica where replicas are independent, else one.

Arithmetic on settings. Invariant: the engines together have the replicas, in order, and the ranks that were asked for,
and no two share a device, a port or, where there are enough, a core.
"""

import dataclasses
import os

from argosy.config import EngineConfig


def plan_engines(config: EngineConfig, num_cores: int | None = None) -> tuple[EngineConfig, ...]:
    """The config of every engine process, replicas in order. ``num_cores``: to share; None = those of this process.

    Replicas whose experts are their own need nothing of each other, so that each is an engine: what kills one leaves
    the others alone. With several nodes one engine holds all of them, since a server starts processes on its own node.
    """
    if not are_replicas_independent(config):
        return (config,)
    if config.num_threads is None:
        num_cores = num_cores or len(os.sched_getaffinity(0))
        config = dataclasses.replace(config, num_threads=max(1, num_cores // config.world_size))
    return tuple(_plan_replica(config, dp_rank) for dp_rank in range(config.dp_size))


def are_replicas_independent(config: EngineConfig) -> bool:
    """Whether no expert is shared between replicas, and all ranks are on this node."""
    is_shared = config.ep_size is None or config.ep_size > config.tp_size
    return config.dp_size > 1 and config.nnodes == 1 and not is_shared


def _plan_replica(config: EngineConfig, dp_rank: int) -> EngineConfig:
    return dataclasses.replace(
        config,
        dp_size=1,
        first_device=config.first_device + dp_rank * config.tp_size,
        master_port=None if config.master_port is None else config.master_port + dp_rank,
        flight_recorder_dir=config.flight_recorder_dir and f"{config.flight_recorder_dir}/engine-{dp_rank}",
    )
