"""What one rank's process does: meet the others, load its share of the model, then lead a replica or follow its leader.

The launcher starts it and watches over it (``distributed/launcher.py``); steps are ``replica_loop.py`` and
``replica_ranks.py``. Invariant: every rank passes the same named phases in the same order, each with a deadline, so a
rank that is missing is named within it.
"""

import dataclasses
import os
from functools import partial

import msgspec
import torch

from argosy.config import EngineConfig
from argosy.distributed.dp_coord import (
    DPCoordinator,
    ExchangePolicy,
    choose_ll_max_tokens_per_rank,
    expected_ranks_visited,
)
from argosy.distributed.ep_dispatch import build_dispatcher
from argosy.distributed.ep_self_test import check_experts
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.rank_process import RankContext
from argosy.distributed.recordings import NO_RECORDINGS, RecordingTable
from argosy.distributed.self_test import run_self_test
from argosy.engine.build_rank import (
    DTYPES,
    build_graphs,
    build_runner,
    build_scheduler,
    check_num_blocks,
    choose_recordings,
    connect_symmetric,
    exchange_under,
    load_model,
    measure_num_blocks,
    measure_step,
    warm_up_kernels,
)
from argosy.engine.meeting_points import PlanHub, PlanSpoke, connect_to_driver, connect_to_leader, open_plan_hub
from argosy.engine.model_directory import resolve_model_directory
from argosy.engine.replica_loop import ReplicaLoop
from argosy.engine.replica_messages import RankHello, RankStats, ReplicaReady
from argosy.engine.replica_ranks import ReplicaRanks, follow_leader
from argosy.models.deepseek.config import ModelConfig, load_model_config
from argosy.platforms import Platform, select_platform
from argosy.runner.model_runner import ModelRunner


class RankSettings(msgspec.Struct, frozen=True):
    """What the launching process tells its ranks."""

    config: EngineConfig  # as ``prepare`` returns it
    num_valid_tokens: int  # entries of the tokenizer
    fingerprints: dict[str, str]  # of this node
    num_local_ranks: int
    is_one_node: bool


def run_worker(context: RankContext) -> None:
    """The entry of every rank; returns when the engine is shut down."""
    settings = msgspec.msgpack.decode(context.payload, type=RankSettings)
    worker = RankWorker(context, settings)
    runner = worker.set_up()
    if context.layout.is_leader(context.rank):
        worker.lead(runner)
    else:
        worker.follow(runner)


class RankWorker:
    """One rank between its start and its end."""

    def __init__(self, context: RankContext, settings: RankSettings) -> None:
        self._context = context
        self._settings = settings
        self._config = settings.config
        self._platform = select_platform(settings.config.device)
        self._mesh = ParallelMesh.local()
        self._dp_rank = context.layout.coords(context.rank).dp

    def set_up(self) -> ModelRunner:
        """Every phase from the comparison of settings to an empty cache and recorded steps. Collective over world.

        Raises:
            ValueError: what the user gave cannot work, or differs between nodes.
            RuntimeError: a rank, a file or a device failed.
        """
        config, phases, local_rank = self._config, self._context.phases, self._context.local_rank
        torch.set_num_threads(config.num_threads or max(1, num_usable_cores() // self._settings.num_local_ranks))
        platform = self._platform
        platform.make_current(config.first_device + local_rank)
        device = platform.device(config.first_device + local_rank)
        directory = resolve_model_directory(config.model)
        model_config = load_model_config(directory)
        with phases.run("fingerprints"):
            phases.compare_fingerprints(self._settings.fingerprints)
        with phases.run("groups"):
            self._mesh = self._context.build_mesh(platform)
            symmetric = connect_symmetric(config, model_config, self._mesh.ep, device)
        with phases.run("self-test"):
            build = partial(build_dispatcher, symmetric=symmetric)
            run_self_test(self._mesh, device, moe_check=lambda: check_experts(self._mesh.ep, device, build))
        with phases.run("weights", deadline_s=config.weights_timeout_s):
            model = load_model(config, directory, model_config, self._mesh, platform, device, symmetric=symmetric)
        policy = self._build_policy(model_config)
        exchange_of = exchange_under(policy)
        with phases.run("workspace", deadline_s=config.weights_timeout_s):  # compiles kernels, where there are any
            workspace_bytes = measure_step(config, model_config, model, platform, device, exchange_of)
        with phases.run("cache"):
            num_blocks = self._agree_on_num_blocks(model_config, platform, workspace_bytes)
            self._config = dataclasses.replace(config, num_blocks=num_blocks)
            runner = build_runner(self._config, model_config, model, self._settings.num_valid_tokens, platform, device)
        with phases.run("kernels", deadline_s=config.weights_timeout_s):
            warm_up_kernels(self._config, model_config, runner, platform, exchange_of)
        with phases.run("graphs", deadline_s=config.weights_timeout_s):
            table = self._agree_on_recordings(model_config, policy)
            runner.graphs = build_graphs(runner, platform, table, exchange_of=exchange_of, world=self._mesh.world)
            runner.try_graphs(exchange_of)
        runner.compilations.start_counting()
        return runner

    def lead(self, runner: ModelRunner) -> None:
        """The loop of a replica's first rank."""
        layout, rank = self._context.layout, self._context.rank
        model_config = load_model_config(resolve_model_directory(self._config.model))
        followers = tuple(each for each in layout.group_of("replica", rank) if each != rank)
        hub: PlanHub = open_plan_hub(self._context.store, self._dp_rank, is_one_node=self._settings.is_one_node)
        hub.receive_from(followers, self._config.startup_timeout_s)
        driver = connect_to_driver(self._context.store, self._dp_rank, self._config.startup_timeout_s)
        recordings = NO_RECORDINGS if runner.graphs is None else runner.graphs.table
        coordinator = DPCoordinator(self._mesh.leaders.named("agreement on a step"))
        loop = ReplicaLoop(
            build_scheduler(self._config),
            ReplicaRanks(runner, hub, followers, lambda: self._count_stats(runner)),
            policy=msgspec.structs.replace(self._build_policy(model_config), recordings=recordings),
            eos_token_ids=model_config.eos_token_ids,
            coordinator=coordinator,
            report=driver.send,
        )
        assert self._config.num_blocks is not None
        num_graphs = 0 if runner.graphs is None else runner.graphs.num_graphs
        driver.send(ReplicaReady(self._config.num_blocks, self._config.dtype, self._platform.device_name(), num_graphs))
        while not loop.is_stopped:
            for command in driver.receive(waits=loop.is_asleep):
                loop.receive(command)
            if not loop.is_asleep:
                loop.carry_out(coordinator.agree(loop.propose(), loop.policy))
        hub.close()
        driver.close()

    def follow(self, runner: ModelRunner) -> None:
        """The loop of a rank that does not lead."""
        spoke: PlanSpoke = connect_to_leader(
            self._context.store, self._dp_rank, self._context.rank, self._config.startup_timeout_s
        )
        spoke.send(RankHello())
        follow_leader(spoke, runner, lambda: self._count_stats(runner))
        spoke.close()

    def _agree_on_num_blocks(self, model_config: ModelConfig, platform: Platform, workspace_bytes: int) -> int:
        """The smallest cache of all ranks: replicas must be alike, and the ranks of one share a block table."""
        config, num_local_ranks = self._config, self._settings.num_local_ranks
        dtype = DTYPES[config.dtype]
        mine = measure_num_blocks(config, model_config, dtype, platform, num_local_ranks, workspace_bytes)
        num_blocks = min(int(text) for text in self._context.phases.gather("num_blocks", str(mine)))
        check_num_blocks(config, num_blocks)
        return num_blocks

    def _build_policy(self, model_config: ModelConfig) -> ExchangePolicy:
        return build_policy(self._config, model_config, self._context.layout.num_ep_ranks, self._platform)

    def _agree_on_recordings(self, model_config: ModelConfig, policy: ExchangePolicy) -> RecordingTable:
        """None if one rank cannot: nobody may wait for it in a graph."""
        ep_size = self._context.layout.num_ep_ranks
        mine = choose_recordings(self._config, model_config, self._platform, policy, ep_size)
        can_all = all(text == "yes" for text in self._context.phases.gather("graphs", "yes" if mine.sizes else "no"))
        return mine if can_all else NO_RECORDINGS

    def _count_stats(self, runner: ModelRunner) -> RankStats:
        mesh = self._mesh
        communicators = (mesh.world, mesh.tp, mesh.ep, mesh.leaders)
        return RankStats(
            rank=self._context.rank,
            pid=os.getpid(),
            bytes_sent={each.axis: dict(each.bytes_sent) for each in communicators},
            waited_s={each.axis: sum(each.waited_s.values()) for each in communicators if each.waited_s},
            tokens_per_expert=runner.model.expert_load.local_counts(),
            num_late_compilations=runner.compilations.num_compilations,
            num_replays=runner.num_replays,
        )


def num_usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def build_policy(config: EngineConfig, model_config: ModelConfig, ep_size: int, platform: Platform) -> ExchangePolicy:
    ll_max = config.ll_max_tokens_per_rank
    if ll_max is None:
        ranks_visited = expected_ranks_visited(
            ep_size,
            num_experts=model_config.n_routed_experts,
            num_experts_per_tok=model_config.num_experts_per_tok,
            n_group=model_config.n_group,
            topk_group=model_config.topk_group,
        )
        ll_max = choose_ll_max_tokens_per_rank(ep_size, ranks_visited, is_card=platform.device_type != "cpu")
    return ExchangePolicy(
        ep_mode=config.ep_mode,
        ll_max_tokens_per_rank=ll_max,
        ranks_per_replica=config.world_size // config.dp_size,
    )
