"""The life of one rank's process: connect, claim the rank, meet the others, run the entry, and end with a clear code.

Which processes exist and what becomes of them is ``launcher.py``'s business. Invariant: a rank never leaves without a
word: it ends with 0 after telling the others, with 1 after publishing its error, or with 70 for another rank's error;
only a signal is silent, and that the launcher sees.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn

from argosy.distributed.flight_recorder import FlightRecorder
from argosy.distributed.layout import ParallelLayout
from argosy.distributed.mesh import ParallelMesh
from argosy.distributed.rendezvous import (
    LOOPBACK_ADDRESS,
    RankStore,
    StoreAddress,
    StoreLostError,
    TorchrunPlace,
    connect_store,
)
from argosy.distributed.startup import (
    RENDEZVOUS,
    Abort,
    PeerFailedError,
    PhaseTimeoutError,
    PlaceTakenError,
    StartupPhases,
    claim_place,
    publish_abort,
    read_abort,
)
from argosy.distributed.watchdog import FAILURE_EXIT_CODE, ROOT_CAUSE_S, SURVIVOR_EXIT_CODE, Watchdog
from argosy.platforms.base import Platform

PR_SET_PDEATHSIG = 1  # Linux: the signal this process gets when its parent dies


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What to start, and where ranks meet.

    Raises:
        ValueError: torchrun started another number of ranks than the layout has.
    """

    layout: ParallelLayout
    payload: bytes = b""  # for the entry: settings, as JSON or msgpack
    nnodes: int = 1  # divides the world size; each node has an equal block of ranks
    node_rank: int = 0
    master_addr: str | None = None  # of node 0; None: this machine alone
    master_port: int | None = None  # None: a free one
    collective_timeout_s: float = 30.0  # also how long a rank may give no sign of life
    startup_timeout_s: float = 120.0  # of each phase that names no deadline
    flight_recorder_dir: str | None = None  # None: a directory in the system's temporary one, made on failure only
    torchrun: TorchrunPlace | None = None  # this process's place, if torchrun started it: its one rank is started
    preload: tuple[str, ...] = ()  # modules to import once, before the ranks are forked

    def __post_init__(self) -> None:
        if self.torchrun is not None and self.torchrun.world_size != self.layout.world_size:
            raise ValueError(
                f"torchrun started {self.torchrun.world_size} ranks, but the layout has {self.layout.world_size}; "
                "set --dp-size and --tp-size so that their product is torchrun's number of processes"
            )

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this node (under torchrun: of this process)."""
        if self.torchrun is not None:
            return (self.torchrun.rank,)
        num_ranks = self.layout.world_size // self.nnodes
        return tuple(range(self.node_rank * num_ranks, (self.node_rank + 1) * num_ranks))

    @property
    def is_store_host(self) -> bool:
        if self.torchrun is not None:
            return self.torchrun.rank == 0 and not self.torchrun.is_store_hosted
        return self.node_rank == 0

    @property
    def store_address(self) -> StoreAddress:
        """Port 0: a free one, to be chosen by the host."""
        if self.torchrun is not None:
            return self.torchrun.address
        return StoreAddress(self.master_addr or LOOPBACK_ADDRESS, self.master_port or 0)


@dataclass(frozen=True, slots=True)
class RankSeat:
    """What a process needs to become a rank."""

    spec: LaunchSpec
    rank: int
    local_rank: int
    address: StoreAddress
    dump_directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What an entry gets. All ranks have met, the watchdog runs, and there are no process groups yet."""

    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    layout: ParallelLayout
    payload: bytes
    store: RankStore
    phases: StartupPhases
    recorder: FlightRecorder
    watchdog: Watchdog
    collective_timeout_s: float

    def build_mesh(self, platform: Platform) -> ParallelMesh:
        """Once, with the rank's device current. Collective over world."""
        return ParallelMesh.build(
            self.layout,
            self.rank,
            store=self.store,
            platform=platform,
            timeout_s=self.collective_timeout_s,
            recorder=self.recorder,
        )


def become_rank(entry: Callable[[RankContext], None], spec: LaunchSpec) -> NoReturn:
    """Under torchrun, for ranks above 0: this process is the rank. Ends the process."""
    place = spec.torchrun
    assert place is not None, "become_rank is for processes that torchrun started"
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to all ranks, and rank 0's process says so
        signal.signal(number, signal.SIG_DFL)
    dump_directory = spec.flight_recorder_dir or default_dump_directory()
    run_seat(entry, RankSeat(spec, place.rank, place.local_rank, place.address, dump_directory))


def run_seat(entry: Callable[[RankContext], None], seat: RankSeat) -> NoReturn:
    """The rank's whole life. Ends the process."""
    store: RankStore | None = None
    try:
        store = connect_store(seat.address, seat.spec.startup_timeout_s)
        context = _meet(seat, store)
        _run_entry(entry, context)
        exit_code = 0
    except BaseException as error:  # also SystemExit: an entry that leaves early would leave the others waiting
        exit_code = _report(error, seat.rank, store)
    sys.stdout.flush()
    sys.stderr.flush()
    # NOTE(order): no interpreter shutdown: threads of gloo and NCCL may be stuck, and would hold the process.
    os._exit(exit_code)


def die_with_launcher() -> None:
    """However the launching process ends, also by SIGKILL, this one follows, also when it is stopped.

    The launching process takes the fork server with it, and that one its children; but multiprocessing hands each child
    a pipe that keeps the server alive, and one stopped child would then keep it and itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # NOTE(order): only now may the server go; had it gone before, nobody would tell this process.
    keep_alive = forkserver._forkserver._forkserver_alive_fd  # type: ignore[attr-defined]
    if keep_alive is not None:
        os.close(keep_alive)
    launcher = multiprocessing.parent_process()
    if launcher is not None and not launcher.is_alive():
        os._exit(SURVIVOR_EXIT_CODE)


def default_dump_directory() -> str:
    return str(Path(tempfile.gettempdir()) / f"argosy-failure-{os.getpid()}")


def _meet(seat: RankSeat, store: RankStore) -> RankContext:
    spec = seat.spec
    world_size = spec.layout.world_size
    recorder = FlightRecorder()
    phases = StartupPhases(store, seat.rank, world_size, spec.startup_timeout_s)
    claim_place(store, "rank", seat.rank, world_size)
    with phases.run(RENDEZVOUS):
        watchdog = Watchdog(
            store.clone(),
            seat.rank,
            world_size,
            recorder=recorder,
            phases=phases,
            timeout_s=spec.collective_timeout_s,
            dump_directory=Path(seat.dump_directory),
        )
    watchdog.start()
    return RankContext(
        rank=seat.rank,
        local_rank=seat.local_rank,
        node_rank=spec.node_rank,
        world_size=world_size,
        layout=spec.layout,
        payload=spec.payload,
        store=store,
        phases=phases,
        recorder=recorder,
        watchdog=watchdog,
        collective_timeout_s=spec.collective_timeout_s,
    )


def _run_entry(entry: Callable[[RankContext], None], context: RankContext) -> None:
    try:
        entry(context)
    except PeerFailedError as error:
        context.watchdog.peer_failed(error.abort)
    context.watchdog.stop()
    context.store.add("ended", 1)


def _report(error: BaseException, rank: int, store: RankStore | None) -> int:
    """Publish the error unless another came first, print it if it counts; the exit code."""
    if isinstance(error, PeerFailedError):
        sys.stderr.write(f"argosy rank {rank}: ended, for another rank failed: {error}\n")
        return SURVIVOR_EXIT_CODE
    if isinstance(error, PlaceTakenError):  # has spoken to the others itself, unless they are none of its business
        sys.stderr.write(f"argosy rank {rank}: {error}\n")
        return FAILURE_EXIT_CODE
    is_user_error = isinstance(error, ValueError)
    culprits = error.missing if isinstance(error, PhaseTimeoutError) else (rank,)
    text = str(error) if isinstance(error, (PhaseTimeoutError, StoreLostError)) else f"rank {rank}: {_name(error)}"
    abort = Abort(text=text, ranks=culprits, is_user_error=is_user_error)
    try:
        is_first = store is None or _publish(store, abort, wait_for_cause=not is_user_error)
    except StoreLostError as lost:
        time.sleep(ROOT_CAUSE_S)  # if this node's launching process is gone too, this one is killed now: no more words
        first_line = f"{_name(error).splitlines()[0]}; " if not isinstance(error, StoreLostError) else ""
        sys.stderr.write(f"argosy rank {rank}: {first_line}{lost}\n")
        return FAILURE_EXIT_CODE
    if is_first and not is_user_error and not isinstance(error, PhaseTimeoutError):
        traceback.print_exception(error)
    elif is_first:
        sys.stderr.write(f"argosy rank {rank}: {error}\n")
    return FAILURE_EXIT_CODE if is_first else SURVIVOR_EXIT_CODE


def _publish(store: RankStore, abort: Abort, wait_for_cause: bool) -> bool:
    """Whether ``abort`` is the first."""
    deadline = time.monotonic() + (ROOT_CAUSE_S if wait_for_cause else 0.0)
    while wait_for_cause and time.monotonic() < deadline and read_abort(store) is None:
        time.sleep(0.05)  # a lost connection is an effect: let who knows the cause be first
    return publish_abort(store, abort) == abort


def _name(error: BaseException) -> str:
    return str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
