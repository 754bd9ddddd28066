"""From an ``EngineConfig`` to a running engine: one rank in this process, or many in processes of their own.

The driver is the process that calls ``deploy``; other nodes call ``host_ranks``. What the ranks do is ``worker.py``;
how processes are started and watched is ``distributed/launcher.py``. Invariant: when ``deploy`` raises, no process of
it is left.
"""

import atexit
import dataclasses
import os
import time
from dataclasses import dataclass

import msgspec

from argosy.config import EngineConfig
from argosy.distributed.launcher import Failure, RankProcesses
from argosy.distributed.rank_process import LaunchSpec, become_rank
from argosy.distributed.rendezvous import TorchrunPlace, read_torchrun_environment
from argosy.engine.build import BuiltEngine, Preparation, StartProgress, build_engine, prepare
from argosy.engine.engine_client import EngineClient, InProcessClient
from argosy.engine.fingerprints import build_fingerprints
from argosy.engine.meeting_points import DriverHub, open_driver_hub
from argosy.engine.rank_imports import modules_of_ranks
from argosy.engine.replica_client import ReplicasClient
from argosy.engine.replica_messages import Command, ReplicaReady, Report
from argosy.engine.tokenizer import Tokenizer
from argosy.engine.wire import AnySpoke
from argosy.engine.worker import RankSettings, run_worker
from argosy.models.deepseek.config import ModelConfig

# Rendezvous, fingerprints, groups, self-test, cache, sockets; and the long ones: weights, workspace, kernels, graphs.
# Each is bounded on the ranks, which can say who is missing, so this is for ranks that say nothing at all.
_NUM_PHASES = 6
_NUM_LONG_PHASES = 4
_POLL_S = 0.1
_GRACE_S = 5.0
_ROOT_CAUSE_S = 5.0  # from the first sign of trouble until the launcher knows the cause


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningEngine:
    """An engine and what its callers need beside it."""

    config: EngineConfig  # as given, with max_model_len, num_blocks, dtype and quantization filled in
    model_config: ModelConfig
    tokenizer: Tokenizer
    device_name: str  # what the hardware calls itself
    client: EngineClient
    built: BuiltEngine | None  # an engine in this process; None: it is in others
    num_graphs: int  # recordings of decode steps
    start_s: float


def deploy(config: EngineConfig, on_progress: StartProgress | None = None) -> RunningEngine:
    """Start an engine and wait until it can take requests. Under torchrun only rank 0 returns; the others become ranks.

    ``on_progress``: see ``build_engine``; ranks in processes of their own report none.

    Raises:
        ValueError: settings, a model or a machine that cannot work, or a node that only hosts.
        RuntimeError: a file, a device or a rank failed.
    """
    started_s = time.monotonic()
    if config.node_rank > 0:
        raise ValueError(
            f"node_rank {config.node_rank} hosts ranks and answers nothing: node 0 does; start this node with "
            "`argosy generate --node-rank ...`, or call host_ranks"
        )
    place = read_torchrun_environment(os.environ)
    _check_place(config, place)
    prepared = prepare(config)
    if config.world_size == 1:
        return _adopt(build_engine(prepared, on_progress=on_progress), started_s)
    return _start_ranks(prepared, place, started_s)


def host_ranks(config: EngineConfig) -> None:
    """Run this node's ranks until node 0 ends the engine.

    Raises:
        ValueError: settings, a model or a machine that cannot work, or that differ from the other nodes'.
        RuntimeError: a rank, a node or the network failed.
    """
    _check_place(config, read_torchrun_environment(os.environ))
    prepared = prepare(config)
    processes = RankProcesses.start(run_worker, build_spec(prepared, None))
    try:
        failure = processes.wait()
    finally:
        processes.close(grace_s=0.0)
    if failure is not None:
        raise _as_error(failure)


def end_engine(client: EngineClient) -> None:
    """Close it now instead of at Python's exit."""
    client.close()
    atexit.unregister(client.close)


class ProcessLink:
    """``ReplicaLink`` over sockets to the leaders, and the processes of this node."""

    def __init__(self, processes: RankProcesses, hub: DriverHub, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self._processes = processes
        self._hub = hub

    def send(self, dp_rank: int, command: Command) -> None:
        try:
            self._hub.send(dp_rank, command)
        except RuntimeError as error:
            failure = self._processes.wait(_ROOT_CAUSE_S)
            self.close(is_orderly=False)
            raise error if failure is None else _as_error(failure) from error

    def receive(self, timeout_s: float, interrupt: AnySpoke | None = None) -> list[tuple[int, Report]]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            reports = self._hub.receive(min(_POLL_S, max(left_s, 0.0)), interrupt)
            if reports:
                return reports
            self._check_processes()
            if left_s <= 0 or (interrupt is not None and interrupt.wait(0.0)):
                return []

    def close(self, *, is_orderly: bool) -> None:
        self._hub.close()
        self._processes.close(grace_s=_GRACE_S if is_orderly else 0.0)

    def _check_processes(self) -> None:
        failure = self._processes.poll()
        if failure is not None:
            self.close(is_orderly=False)
            raise _as_error(failure)
        if self._processes.is_finished:
            raise RuntimeError("the ranks have ended though nobody told them to; restart the engine")


def _check_place(config: EngineConfig, place: TorchrunPlace | None) -> None:
    if place is None:
        return
    if config.nnodes > 1:
        raise ValueError(
            f"torchrun started this process (RANK is set), and nnodes ({config.nnodes}) would start ranks itself; "
            "give --nnodes to torchrun alone, or start argosy without it"
        )
    if place.world_size != config.world_size:
        raise ValueError(
            f"torchrun started {place.world_size} processes (WORLD_SIZE), but dp_size ({config.dp_size}) x tp_size "
            f"({config.tp_size}) is {config.world_size}; set --dp and --tp to match --nproc-per-node x --nnodes"
        )


def _adopt(built: BuiltEngine, started_s: float) -> RunningEngine:
    return RunningEngine(
        config=built.config,
        model_config=built.model_config,
        tokenizer=built.tokenizer,
        device_name=built.platform.device_name(),
        client=InProcessClient(built.core, built.model_config.eos_token_ids),
        built=built,
        num_graphs=0 if built.core.runner.graphs is None else built.core.runner.graphs.num_graphs,
        start_s=time.monotonic() - started_s,
    )


def _start_ranks(prepared: Preparation, place: TorchrunPlace | None, started_s: float) -> RunningEngine:
    spec = build_spec(prepared, place)
    if place is not None and place.rank > 0:
        become_rank(run_worker, spec)
    config = prepared.config
    processes = RankProcesses.start(run_worker, spec)
    try:
        hub = open_driver_hub(processes.store, is_one_node=_is_one_node(config, place))
        link = ProcessLink(processes, hub, config.dp_size)
        ready = _wait_for_replicas(link, config)
    except BaseException:
        processes.close(grace_s=0.0)
        raise
    num_blocks = min(each.num_blocks for each in ready)
    assert config.max_model_len is not None
    client = ReplicasClient(
        link, max_model_len=config.max_model_len, block_size=config.block_size, num_blocks=num_blocks
    )
    atexit.register(client.close)  # NOTE(order): before the launcher's own, which only waits for ranks to end
    return RunningEngine(
        config=dataclasses.replace(config, num_blocks=num_blocks),
        model_config=prepared.model_config,
        tokenizer=prepared.tokenizer,
        device_name=ready[0].device_name,
        client=client,
        built=None,
        num_graphs=min(each.num_graphs for each in ready),
        start_s=time.monotonic() - started_s,
    )


def _wait_for_replicas(link: ProcessLink, config: EngineConfig) -> list[ReplicaReady]:
    """By dp rank."""
    ready: dict[int, ReplicaReady] = {}
    timeout_s = config.startup_timeout_s * _NUM_PHASES + _NUM_LONG_PHASES * config.weights_timeout_s
    deadline_s = time.monotonic() + timeout_s
    while len(ready) < config.dp_size:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            missing = sorted(set(range(config.dp_size)) - set(ready))
            raise RuntimeError(f"the leaders of replicas {missing} were not ready within {timeout_s:g} s")
        for dp_rank, report in link.receive(left_s):
            assert isinstance(report, ReplicaReady), f"replica {dp_rank} sent {report!r} before it was ready"
            ready[dp_rank] = report
    return [ready[dp_rank] for dp_rank in range(config.dp_size)]


def build_spec(prepared: Preparation, place: TorchrunPlace | None) -> LaunchSpec:
    config = prepared.config
    num_local_ranks = config.world_size // config.nnodes if place is None else place.num_local_ranks
    _check_devices(prepared, num_local_ranks)
    settings = RankSettings(
        config=config,
        num_valid_tokens=prepared.tokenizer.vocab_size,
        fingerprints=build_fingerprints(config, prepared.directory, prepared.platform.device_type),
        num_local_ranks=num_local_ranks,
        is_one_node=_is_one_node(config, place),
    )
    return LaunchSpec(
        layout=prepared.layout,
        payload=msgspec.msgpack.encode(settings),
        nnodes=config.nnodes,
        node_rank=config.node_rank,
        master_addr=config.master_addr,
        master_port=config.master_port,
        collective_timeout_s=config.collective_timeout_s,
        startup_timeout_s=config.startup_timeout_s,
        flight_recorder_dir=config.flight_recorder_dir,
        torchrun=place,
        preload=modules_of_ranks(),
    )


def _check_devices(prepared: Preparation, num_local_ranks: int) -> None:
    num_devices = prepared.platform.num_devices()
    config = prepared.config
    if num_devices is not None and num_devices < config.first_device + num_local_ranks:
        raise ValueError(
            f"{num_local_ranks} ranks of this node (of dp_size {config.dp_size} x tp_size {config.tp_size}) need "
            f"a device each, but there are {num_devices - config.first_device} from number {config.first_device} on; "
            "lower --dp, --tp or --first-device, raise --nnodes, or set --device cpu"
        )


def _is_one_node(config: EngineConfig, place: TorchrunPlace | None) -> bool:
    """torchrun does not say."""
    return config.nnodes == 1 and place is None


def _as_error(failure: Failure) -> Exception:
    return ValueError(failure.text) if failure.is_user_error else RuntimeError(failure.text)
