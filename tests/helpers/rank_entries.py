"""What ranks do in the tests of launcher, start-up and watchdog: entries, and the harness that runs and hurts them."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from argosy.distributed.launcher import Failure, RankProcesses
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.rank_process import LaunchSpec, RankContext
from argosy.distributed.startup import StartupPhases
from argosy.engine.worker import RankSettings, RankWorker, run_worker
from argosy.platforms import MemoryInfo
from argosy.platforms.cpu import CpuPlatform

TIMEOUT_S = 3.0  # of collectives, in tests
SLOW_S = 2.5
LAYOUT = ParallelLayout(dp_size=2, tp_size=2)
CARD_BYTES, CARD_STEP_BYTES = 3 * 2**29, 2**20


def connect(context: RankContext) -> ParallelMesh:
    torch.set_num_threads(1)
    with context.phases.run("groups"):
        return context.build_mesh(CpuPlatform())


def reduce_for_ever(context: RankContext) -> None:
    tp = connect(context).tp.named("layer 3 attention")
    x = torch.ones(1000)
    context.store.set(f"ready/{context.rank}", "1")
    while True:
        tp.all_reduce(x.fill_(1.0))


def idle_for_ever(context: RankContext) -> None:
    connect(context)
    context.store.set(f"ready/{context.rank}", "1")
    time.sleep(1000)


class FatalPhases(StartupPhases):
    """A rank's own phases, but at the beginning of the one called ``fatal_name`` the process strikes itself."""

    def __init__(self, context: RankContext, fatal_name: str, blow: signal.Signals) -> None:
        self._inner, self._store = context.phases, context.store
        self._fatal_name, self._blow = fatal_name, blow

    @contextlib.contextmanager
    def run(self, name: str, deadline_s: float | None = None) -> Iterator[None]:
        with self._inner.run(name, deadline_s):
            if name == self._fatal_name:
                self._store.set("struck", "1")
                os.kill(os.getpid(), self._blow)
            yield

    def gather(self, name: str, value: str) -> list[str]:
        return self._inner.gather(name, value)

    def compare_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        self._inner.compare_fingerprints(fingerprints)


def lose_rank_2_in_phase(name: str, blow: signal.Signals, context: RankContext) -> None:
    """Every rank is the product's own, up to there."""
    if context.rank == 2:
        context = dataclasses.replace(context, phases=FatalPhases(context, name, blow))
    run_worker(context)


def be_slow_in_a_phase(context: RankContext) -> None:
    """Rank 1 takes longer than a collective or a sign of life may take, but not longer than a phase."""
    with context.phases.run("weights"):
        time.sleep(SLOW_S if context.rank == 1 else 0.0)


def skip_a_collective(context: RankContext) -> None:
    """Rank 3 stays away from one all-reduce, alive and beating."""
    mesh = connect(context)
    for step in range(5):
        if context.rank == 3 and step == 3:
            time.sleep(1000)
        mesh.world.named(f"step {step}").all_reduce(torch.ones(4))


def skip_a_replay(context: RankContext) -> None:
    """Rank 3 stays away from the third replay of a step whose tp collective its neighbour alone would miss it in."""
    mesh = connect(context)
    tp, world = mesh.tp.named("layer 0 attention"), mesh.world

    def step() -> torch.Tensor:
        return world.all_reduce(tp.all_reduce(torch.ones(4)))

    step()
    platform = CpuPlatform()
    with world.taping() as tape:
        graph = platform.capture(step, platform.new_graph_pool())
    recorded = world.named("decode steps of up to 4 x 64 tokens")
    for i in range(5):
        if context.rank == 3 and i == 2:
            time.sleep(1000)
        recorded.replay(tape, graph.replay, platform.mark)


def fail_on_rank_1(context: RankContext) -> None:
    connect(context)
    with context.phases.run("weights"):
        if context.rank == 1:
            raise ValueError("model.safetensors: no such tensor; set --model to another directory")


def crash_on_rank_1(context: RankContext) -> None:
    mesh = connect(context)
    if context.rank == 1:
        raise KeyError("planted")
    mesh.world.all_reduce(torch.ones(4))


def differ(context: RankContext) -> None:
    with context.phases.run("fingerprints"):
        context.phases.compare_fingerprints({"dtype": "bf16", "tp_size": "4" if context.rank >= 2 else "2"})


def finish(context: RankContext) -> None:
    mesh = connect(context)
    with context.phases.run("cache"):
        numbers = context.phases.gather("num_blocks", str(100 - context.rank))
    total = mesh.world.all_reduce(torch.ones(1)).item()
    if context.rank == 0:
        context.store.set("result", json.dumps([numbers, total, context.payload.decode()]))


def spec(directory: Path, **changes: object) -> LaunchSpec:
    settings: dict[str, object] = {
        "layout": LAYOUT,
        "collective_timeout_s": TIMEOUT_S,
        "startup_timeout_s": 20.0,
        "flight_recorder_dir": str(directory),
    }
    return LaunchSpec(**{**settings, **changes})  # type: ignore[arg-type]


def await_ready(processes: RankProcesses) -> None:
    for rank in range(LAYOUT.world_size):
        assert processes.store.wait_for(f"ready/{rank}", 30.0), f"rank {rank} did not get ready: {processes.poll()}"


def strike(processes: RankProcesses, rank: int, blow: signal.Signals) -> tuple[Failure | None, float]:
    """Send the signal; the failure, and the seconds until every rank was gone."""
    started = time.monotonic()
    os.kill(processes.pids[rank], blow)
    failure = processes.wait(60.0)
    return failure, time.monotonic() - started


def reports(directory: Path) -> dict[int, list[str]]:
    """By rank: the report in its flight recorder's file."""
    found = {}
    for path in directory.glob("rank-*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        found[int(path.stem.removeprefix("rank-"))] = content["report"]
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class PretendedCard(CpuPlatform):
    """A CPU that says it is a card: it has memory, counts what tensors take, and finds recordings worth their while."""

    device_type = "card"

    def __init__(self, free_bytes: int, step_bytes: int, *, records_steps: bool) -> None:
        self.records_steps = records_steps  # type: ignore[misc]
        self._free_bytes, self._step_bytes = free_bytes, step_bytes
        self._num_asked = 0  # since the last reset

    def reset_peak(self) -> None:
        self._num_asked = 0

    def memory_info(self) -> MemoryInfo:
        return MemoryInfo(free_bytes=self._free_bytes, total_bytes=CARD_BYTES)

    def peak_bytes(self) -> int | None:
        self._num_asked += 1
        return CARD_STEP_BYTES if self._num_asked == 1 else CARD_STEP_BYTES + self._step_bytes


def set_up_on_cards(poor_rank: int, eager_rank: int, context: RankContext) -> None:
    """Steps of ``poor_rank`` take more than others', and ``eager_rank`` cannot record."""
    worker = RankWorker(context, msgspec.msgpack.decode(context.payload, type=RankSettings))
    step_bytes = CARD_STEP_BYTES * (3 if context.rank == poor_rank else 1)
    worker._platform = PretendedCard(CARD_BYTES // 2, step_bytes, records_steps=context.rank != eager_rank)
    runner = worker.set_up()
    num_graphs = 0 if runner.graphs is None else runner.graphs.num_graphs
    sent = {axis: sorted(getattr(worker._mesh, axis).bytes_sent) for axis in ("tp", "ep")}
    context.store.set(f"result/{context.rank}", json.dumps([runner.cache.num_blocks, num_graphs, sent]))
