"""Phases, places and the report over a dictionary for a store; the self-test over real and broken ranks."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from argosy.distributed.communicator import Communicator
from argosy.distributed.flight_recorder import CollectiveRecord, FlightRecorder
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.pending import Pending, Ready
from argosy.distributed.rendezvous import StoreAddress, TorchrunPlace, find_interface, read_torchrun_environment
from argosy.distributed.self_test import check_all_reduce, check_all_to_all, run_self_test
from argosy.distributed.startup import (
    Abort,
    PeerFailedError,
    StartupPhases,
    claim_place,
    name_ranks,
    publish_abort,
    read_abort,
)
from argosy.distributed.watchdog import Progress, explain_collective, find_absent
from tests.helpers.rank_pool import PoolContext, RankPool


class DictStore:
    """The store's promises, within one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def set_first(self, key: str, value: str) -> str:
        with self._changed:
            return self._values.setdefault(key, value)

    def try_get(self, key: str) -> str | None:
        return self._values.get(key)

    def get_all(self, keys: Sequence[str]) -> list[str | None]:
        return [self._values.get(key) for key in keys]

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            self._values[key] = str(int(self._values.get(key, "0")) + amount)
            return int(self._values[key])

    def wait_for(self, key: str, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: key in self._values, timeout_s)

    def clone(self) -> "DictStore":
        return self


def phases_of(store: DictStore, world_size: int, timeout_s: float = 5.0) -> list[StartupPhases]:
    return [StartupPhases(store, rank, world_size, timeout_s) for rank in range(world_size)]


def test_nobody_leaves_a_phase_before_all_arrived() -> None:
    store = DictStore()
    arrived: list[int] = []
    seen: list[int] = []

    def pass_phase(rank: int, phases: StartupPhases) -> None:
        with phases.run("groups"):
            time.sleep(0.05 * rank)
            arrived.append(rank)
        seen.append(len(arrived))

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(pass_phase, range(4), phases_of(store, 4)))
    assert seen == [4, 4, 4, 4]


def test_missing_rank_is_named_with_its_last_phase() -> None:
    store = DictStore()
    one, two, _ = phases_of(store, 3, timeout_s=0.4)
    store.set("at/1", "after phase 'groups'")
    expected = (
        "phase 'weights': ranks 1-2 of 3 did not arrive within 0.4 s \\(rank 1 last seen after phase 'groups', rank 2 "
        "never connected\\).*--weights-timeout-s"
    )
    with pytest.raises(RuntimeError, match=expected), one.run("weights"):
        pass
    with pytest.raises(RuntimeError, match="ranks? .* did not arrive within 0.1 s"), two.run("cache", deadline_s=0.1):
        pass


def test_error_of_one_rank_ends_the_others_wait() -> None:
    store = DictStore()
    one, _ = phases_of(store, 2)
    threading.Timer(0.1, publish_abort, (store, Abort(text="rank 1: no such file"))).start()
    started = time.monotonic()
    with pytest.raises(PeerFailedError, match="rank 1: no such file"), one.run("weights"):
        pass
    assert time.monotonic() - started < 2


def test_first_abort_stands() -> None:
    store = DictStore()
    first = publish_abort(store, Abort(text="cause", ranks=(3,)))
    assert publish_abort(store, Abort(text="effect")) == first == read_abort(store)


def test_fingerprints_name_a_field_that_one_side_lacks() -> None:
    store = DictStore()
    fingerprints = [{"dtype": "bf16"}, {"dtype": "bf16"}, {"dtype": "bf16", "version": "2"}]

    def compare(phases: StartupPhases, values: dict[str, str]) -> str:
        with phases.run("fingerprints"):
            try:
                phases.compare_fingerprints(values)
            except ValueError as error:
                return str(error)
        return ""

    with ThreadPoolExecutor(3) as executor:
        errors = list(executor.map(compare, phases_of(store, 3), fingerprints))
    assert all(
        "version must be equal on all ranks, got 'absent' on ranks 0-1, '2' on rank 2" in text for text in errors
    )


def test_nodes_that_disagree_on_their_number_are_told() -> None:
    store = DictStore()
    claim_place(store, "node", 0, 2)
    with pytest.raises(ValueError, match="node 1 .* was started for 4 nodes, others for 2; .*--nnodes"):
        claim_place(store, "node", 1, 4)


@pytest.mark.parametrize(
    ("ranks", "text"), [([], "ranks none"), ([3], "rank 3"), ([9, 0, 1, 2], "ranks 0-2, 9"), ([0, 2], "ranks 0, 2")]
)
def test_ranks_are_written_as_runs(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text


# --- the report ------------------------------------------------------------------------------------------------------


def record_of(seq: int) -> CollectiveRecord:
    return CollectiveRecord("ep", (0, 1, 2, 3), seq, "all_to_all", "layer 7 moe", (4,), "float32", 16, 0.0)


def test_report_tells_who_arrived_from_who_did_not() -> None:
    at = {seq: Progress(seq=seq, op="all_to_all", label="layer 6 moe", is_open=True) for seq in (8, 9, 10)}
    progress = {0: {"ep": at[9]}, 1: {"ep": at[10]}, 2: {"ep": at[8]}}
    assert explain_collective(record_of(9), progress) == (
        "in all_to_all #9 on axis ep (layer 7 moe): arrived: ranks 0-1; not arrived: rank 2 (last all_to_all #8 "
        "(layer 6 moe)), rank 3 (no answer)"
    )
    assert find_absent(record_of(9), progress, 4) == (3,)
    assert find_absent(record_of(9), {**progress, 3: {}}, 4) == (2, 3)


def test_recorder_keeps_the_last_and_counts_each_axis() -> None:
    recorder = FlightRecorder(capacity=2)
    for axis in ("tp", "ep", "tp"):
        recorder.start(axis, (0, 1), "all_reduce", "", (4,), "float32", 16).finish()
    still_open = recorder.start("ep", (0, 1), "all_gather", "layer 1", (4,), "float32", 16)
    assert recorder.open_records() == [still_open]
    progress = recorder.progress()
    assert (progress["tp"].seq, progress["tp"].is_open) == (2, False)
    assert (progress["ep"].seq, progress["ep"].is_open, progress["ep"].label) == (2, True, "layer 1")


# --- the environment -------------------------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_torchruns_environment_is_a_place() -> None:
    environment = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    address = StoreAddress("10.0.0.1", 29500, "argosy/2")
    assert read_torchrun_environment(environment) == TorchrunPlace(3, 8, 1, 2, address, is_store_hosted=True)
    assert read_torchrun_environment({}) is None
    with pytest.raises(ValueError, match="LOCAL_RANK is ''"):
        read_torchrun_environment({name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"})


def test_interface_of_this_machine_is_the_loopback() -> None:
    assert find_interface("127.0.0.1") == "lo"
    with pytest.raises(ValueError, match="--master-addr"):
        find_interface("no-such-host.invalid")


# --- the self-test ---------------------------------------------------------------------------------------------------


def self_test(context: PoolContext, layout: ParallelLayout) -> None:
    calls = []
    run_self_test(context.mesh(layout), torch.device("cpu"), lambda: calls.append(1))
    assert calls == [1]


def test_self_test_passes_on_a_sound_mesh(rank_pool: RankPool) -> None:
    layout = ParallelLayout(dp_size=2, tp_size=2)
    rank_pool.run(self_test, layout, world=4)
    run_self_test(ParallelMesh.local(), torch.device("cpu"))


class BrokenCommunicator(Communicator):
    """What rank 2 adds does not arrive, and its bytes arrive in another order."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 2.0, 0.0, 4.0])

    def start_all_to_all(self, x: torch.Tensor) -> Pending[torch.Tensor]:
        shifted = x.clone()  # rank 0's view where every pair's bytes were alike
        for source in range(4):
            shifted[source] = pair_bytes(source, 0)
        shifted[2] = shifted[2].roll(1)
        return Ready(shifted)


def pair_bytes(source: int, destination: int) -> torch.Tensor:
    places = torch.arange(4096, dtype=torch.int64) + (source * 65_537 + destination) * 4096
    return (places * 2_654_435_761 >> 16).bitwise_and(255).to(torch.uint8)


def test_self_test_names_the_rank_whose_bytes_are_wrong() -> None:
    broken = BrokenCommunicator("ep", (0, 1, 2, 3), 0, group=None, host_group=None, recorder=FlightRecorder(capacity=1))
    cpu = torch.device("cpu")
    assert check_all_reduce(broken, cpu) == ["all_reduce on axis ep: got [1.0, 2.0, 0.0, 4.0], wrong for rank 2"]
    assert check_all_to_all(broken, cpu) == ["all_to_all on axis ep: the checksum is wrong for bytes from rank 2"]
