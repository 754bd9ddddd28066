"""Starting and ending the ranks of a node as real processes; errors of one rank, places taken, a launcher that dies."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import PContext

from argosy.distributed.launcher import RankProcesses
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.rank_process import LaunchSpec
from argosy.distributed.rendezvous import RankStore, StoreAddress, TorchrunPlace, host_store
from tests.helpers import rank_entries
from tests.helpers.rank_entries import LAYOUT, await_ready, is_alive, spec

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]


def test_ranks_run_and_end_well(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    processes = RankProcesses.start(rank_entries.finish, spec(tmp_path, payload=b"settings"))
    assert processes.wait(60.0) is None
    assert processes.is_finished
    assert json.loads(processes.store.try_get("result") or "") == [["100", "99", "98", "97"], 4.0, "settings"]
    processes.close()
    processes.close()
    assert not any(is_alive(pid) for pid in processes.pids.values())
    assert not list(tmp_path.iterdir())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("is_late", [False, True], ids=["ranks-unwatched", "ranks-watched"])
def test_ctrl_c_between_the_forks_and_the_return_ends_the_ranks(tmp_path: Path, is_late: bool) -> None:
    class Interrupted(RankProcesses):
        def __init__(self, spec: LaunchSpec, store: RankStore, context: PContext) -> None:
            pids.extend(context.pids().values())
            if not is_late:
                signal.raise_signal(signal.SIGINT)
            super().__init__(spec, store, context)
            if is_late:
                signal.raise_signal(signal.SIGINT)

    pids: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Interrupted.start(rank_entries.idle_for_ever, spec(tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(pids) == LAYOUT.world_size and not any(is_alive(pid) for pid in pids)


def test_users_mistake_on_one_rank_ends_all_with_its_text(tmp_path: Path) -> None:
    processes = RankProcesses.start(rank_entries.fail_on_rank_1, spec(tmp_path))
    started = time.monotonic()
    failure = processes.wait(60.0)
    processes.close(grace_s=0)
    assert failure is not None
    assert failure.is_user_error
    assert failure.ranks == (1,)
    assert "no such tensor; set --model" in failure.text
    assert time.monotonic() - started < 15


def test_crash_of_one_rank_is_the_root_cause(tmp_path: Path) -> None:
    processes = RankProcesses.start(rank_entries.crash_on_rank_1, spec(tmp_path))
    failure = processes.wait(60.0)
    processes.close(grace_s=0)
    assert failure is not None
    assert failure.ranks == (1,)
    assert failure.text.splitlines()[0] == "rank 1: KeyError: 'planted'"


def test_crash_is_printed_once_and_every_survivor_reports(tmp_path: Path) -> None:
    script = tmp_path / "launch.py"
    script.write_text(CRASH_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.stderr.count("Traceback") == 1
    assert "KeyError: 'planted'" in run.stderr
    for rank in (0, 2, 3):
        assert f"argosy rank {rank}: rank 1: KeyError: 'planted'" in run.stderr
        assert f"argosy rank {rank}: in all_reduce #1 on axis world: arrived: ranks 0, 2-3; not arrived" in run.stderr
    assert "frame #" not in run.stderr


def test_differing_fingerprints_name_field_values_and_ranks(tmp_path: Path) -> None:
    processes = RankProcesses.start(rank_entries.differ, spec(tmp_path))
    failure = processes.wait(60.0)
    processes.close(grace_s=0)
    assert failure is not None
    assert failure.is_user_error
    assert "tp_size must be equal on all ranks, got '2' on ranks 0-1, '4' on ranks 2-3" in failure.text


def test_close_ends_ranks_that_would_run_for_ever(tmp_path: Path) -> None:
    processes = RankProcesses.start(rank_entries.idle_for_ever, spec(tmp_path))
    await_ready(processes)
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal or a service manager, to all: the launcher decides
        os.kill(processes.pids[1], number)
    assert processes.wait(0.5) is None
    assert is_alive(processes.pids[1])
    processes.close(grace_s=0.5)
    assert not any(is_alive(pid) for pid in processes.pids.values())


CRASH_SCRIPT = """
import sys
from pathlib import Path
from argosy.distributed.launcher import RankProcesses
from tests.helpers import rank_entries

if __name__ == "__main__":
    processes = RankProcesses.start(rank_entries.crash_on_rank_1, rank_entries.spec(Path(sys.argv[1])))
    assert processes.wait(60.0) is not None
    processes.close(grace_s=0)
"""

INTERRUPTED_SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from argosy.distributed.launcher import RankProcesses
from tests.helpers import rank_entries

if __name__ == "__main__":
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        RankProcesses.start(rank_entries.idle_for_ever, rank_entries.spec(Path(sys.argv[1])))
    except KeyboardInterrupt:
        time.sleep(4.0)  # a program that goes on; the imports would be done by then
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        names = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
        print("interrupted; children:", [name for name in names if "resource_tracker" not in name])
"""

LAUNCHER_SCRIPT = """
import sys, time
from pathlib import Path
from argosy.distributed.launcher import RankProcesses
from tests.helpers import rank_entries

if __name__ == "__main__":
    processes = RankProcesses.start(rank_entries.reduce_for_ever, rank_entries.spec(Path(sys.argv[1])))
    rank_entries.await_ready(processes)
    print(*processes.pids.values(), processes.store.address.port, flush=True)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]
    inodes = {int(words[4]) for words in maps}
    print(*(path for path in Path("/dev/shm").iterdir() if path.stat().st_ino in inodes), flush=True)
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[signal.Signals, "subprocess.Popen[str]"]]:
    """One for each way to end it; started at once, for their imports take longest."""
    script = tmp_path_factory.mktemp("launchers") / "launch.py"
    script.write_text(LAUNCHER_SCRIPT)
    launchers = {
        blow: subprocess.Popen(
            [sys.executable, str(script), str(script.parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        for blow in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    }
    yield launchers
    for launcher in launchers.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda blow: blow.name)
def test_ranks_do_not_outlive_the_launching_process(
    blow: signal.Signals, launchers: dict[signal.Signals, "subprocess.Popen[str]"]
) -> None:
    launcher = launchers[blow]
    assert launcher.stdout is not None
    *pids, port = map(int, launcher.stdout.readline().split())
    shared_memory = [Path(name) for name in launcher.stdout.readline().split()]
    assert shared_memory
    os.kill(pids[1], signal.SIGSTOP)  # a stopped rank must go too
    launcher.send_signal(blow)
    launcher.wait(10)
    # The resource tracker, a process of its own, removes the semaphores that the launcher could not.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (
        any(is_alive(pid) for pid in pids) or any(path.exists() for path in shared_memory)
    ):
        time.sleep(0.05)
    assert not [pid for pid in pids if is_alive(pid)]
    assert not [path for path in shared_memory if path.exists()]
    assert rank_entries.is_port_free(port)


# --- places and addresses --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def two_nodes(directory: Path, node_rank: int, port: int, startup_timeout_s: float = 20.0) -> LaunchSpec:
    return spec(
        directory,
        nnodes=2,
        node_rank=node_rank,
        master_addr="127.0.0.1",
        master_port=port,
        startup_timeout_s=startup_timeout_s,
    )


def test_two_launchers_make_one_run(tmp_path: Path) -> None:
    port = free_port()
    nodes = [RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, node, port)) for node in range(2)]
    assert [sorted(node.pids) for node in nodes] == [[0, 1], [2, 3]]
    assert [node.wait(60.0) for node in nodes] == [None, None]
    for node in nodes:
        node.close()
    assert not list(tmp_path.iterdir())


def test_rank_killed_on_one_node_ends_the_other_node(tmp_path: Path) -> None:
    port = free_port()
    nodes = [RankProcesses.start(rank_entries.idle_for_ever, two_nodes(tmp_path, node, port)) for node in range(2)]
    await_ready(nodes[0])
    started = time.monotonic()
    os.kill(nodes[1].pids[3], signal.SIGKILL)
    failures = [node.wait(20.0) for node in nodes]
    assert time.monotonic() - started < 5
    for node in nodes[::-1]:
        node.close(grace_s=0)
    for failure in failures:
        assert failure is not None
        assert "rank 3 (pid" in failure.text
        assert "node 1) was killed by SIGKILL" in failure.text


def test_node_that_never_starts_is_named(tmp_path: Path) -> None:
    node = RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, 0, free_port(), startup_timeout_s=2.0))
    failure = node.wait(30.0)
    node.close(grace_s=0)
    assert failure is not None
    assert "phase 'rendezvous': ranks 2-3 of 4 did not arrive within 2 s (ranks 2-3 never connected)" in failure.text
    assert failure.ranks == (2, 3)


def test_taken_port_is_a_users_mistake(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"master_port \\({port}\\) on 127.0.0.1 is taken.*--master-port"):
            RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, 0, port))


def test_foreign_master_address_is_a_users_mistake(tmp_path: Path) -> None:
    wrong = spec(tmp_path, nnodes=2, master_addr="192.0.2.1", master_port=29500)
    with pytest.raises(ValueError, match="master_addr \\(192.0.2.1\\) is no address of this machine.*--master-addr"):
        RankProcesses.start(rank_entries.finish, wrong)


def test_unreachable_master_is_named(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{port} could not be reached within 1 s.*--master-addr"):
        RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, 1, port, startup_timeout_s=1.0))


def test_something_else_at_the_masters_port_is_told_apart(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RuntimeError, match="does not answer as a store"):
            RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, 1, other.getsockname()[1], 2.0))


def test_two_nodes_with_one_number_end_the_start(tmp_path: Path) -> None:
    port = free_port()
    first = RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, 0, port))
    # The node's place is claimed by the launching process: here it is this process for both, so claim as another one.
    first.store.set("claim/node/1", "pid 1 on elsewhere")
    with pytest.raises(ValueError, match="two processes claim node 1 of 2: pid 1 on elsewhere, and pid"):
        RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, 1, port))
    failure = first.wait(20.0)
    first.close(grace_s=0)
    assert failure is not None
    assert failure.is_user_error
    assert "two processes claim node 1 of 2" in failure.text


def test_two_processes_with_one_rank_end_the_start(tmp_path: Path) -> None:
    """As torchrun's environment set by hand allows."""
    store = host_store()
    place = TorchrunPlace(2, 4, 0, 1, store.address, is_store_hosted=True)
    processes = [RankProcesses.start(rank_entries.finish, spec(tmp_path, torchrun=place)) for _ in range(2)]
    failures = [one.wait(30.0) for one in processes]
    for one in processes:
        one.close(grace_s=0)
    for failure in failures:
        assert failure is not None
        assert "two processes claim rank 2 of 4" in failure.text
    store.close()


def test_a_node_that_closes_tells_the_others_where_the_store_lives_on(tmp_path: Path) -> None:
    """As under torchrun: a lost store would tell them otherwise."""
    store = host_store()
    places = [TorchrunPlace(rank, 2, rank, 2, store.address, is_store_hosted=True) for rank in range(2)]
    long_timeout = spec(tmp_path, layout=ParallelLayout(tp_size=2), collective_timeout_s=60.0)
    first, second = (
        RankProcesses.start(rank_entries.idle_for_ever, dataclasses.replace(long_timeout, torchrun=place))
        for place in places
    )
    for rank in range(2):
        assert store.wait_for(f"ready/{rank}", 30.0)
    started = time.monotonic()
    first.close(grace_s=0)
    failure = second.wait(20.0)
    second.close(grace_s=0)
    store.close()
    assert time.monotonic() - started < 5
    assert failure is not None
    assert "the process that started rank 0 was interrupted, or closed its engine" in failure.text


def test_an_interrupted_start_leaves_no_rank(tmp_path: Path) -> None:
    """Also none that the fork server would fork when its imports are done; and the handlers are the program's own."""
    script = tmp_path / "launch.py"
    script.write_text(INTERRUPTED_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (run.stdout, run.stderr, run.returncode) == ("interrupted; children: []\n", "", 0)


def test_latecomer_leaves_a_run_alone(tmp_path: Path) -> None:
    port = free_port()
    nodes = [RankProcesses.start(rank_entries.idle_for_ever, two_nodes(tmp_path, node, port)) for node in range(2)]
    await_ready(nodes[0])
    nodes[0].store.set("claim/node/1", "pid 1 on elsewhere")
    with pytest.raises(ValueError, match="two processes claim node 1"):
        RankProcesses.start(rank_entries.finish, two_nodes(tmp_path, 1, port))
    time.sleep(1.5)
    assert [node.poll() for node in nodes] == [None, None]
    for node in nodes[::-1]:
        node.close(grace_s=0)


def test_torchrun_with_another_number_of_ranks_is_a_users_mistake() -> None:
    place = TorchrunPlace(0, 8, 0, 8, StoreAddress("127.0.0.1", 1), is_store_hosted=True)
    with pytest.raises(ValueError, match="torchrun started 8 ranks, but the layout has 4; set --dp-size and --tp-size"):
        LaunchSpec(layout=LAYOUT, torchrun=place)
