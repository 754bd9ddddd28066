"""Processes of one node: one a rank, started together, watched, and ended together.

The launching process is no rank. On node 0 it hosts the store; everywhere it notices a rank that died or was stopped,
tells all nodes, gives survivors ``GRACE_S`` for their reports and kills what is left. What a rank does is the entry's
business; what a rank itself notices is ``watchdog.py``. Invariant: when the launching process is gone, by whatever
end, so are its ranks.
"""

import atexit
import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, PContext, start_processes

from argosy.distributed.fork_server_start import (
    SHIELDED_SIGNALS,
    UNSENT_SIGNAL,
    end_fork_server,
    environment_of_ranks,
    start_fork_server,
)
from argosy.distributed.rank_process import (
    LaunchSpec,
    RankContext,
    RankSeat,
    default_dump_directory,
    die_with_launcher,
    run_seat,
)
from argosy.distributed.rendezvous import RankStore, StoreAddress, StoreLostError, connect_store, host_store
from argosy.distributed.startup import Abort, claim_place, name_ranks, publish_abort, read_root_cause

GRACE_S = 3.0  # for survivors' reports; a little more than they wait for each other
POLL_S = 0.2
STORE_POLL_S = 0.5
STOPPED_MARGIN_S = 1.0  # ranks notice a stopped peer too, and can say more
UNKNOWN_EXIT_CODE = 1  # of a process that ended before anybody looked


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the ranks ended, for one ValueError (``is_user_error``) or RuntimeError of the caller."""

    text: str
    ranks: tuple[int, ...] = ()
    is_user_error: bool = False


class RankProcesses:
    """This node's ranks. Build with ``start``; a thread of it watches until ``close``."""

    def __init__(self, spec: LaunchSpec, store: RankStore, context: PContext) -> None:
        self.store = store
        self.pids = {spec.local_ranks[index]: pid for index, pid in context.pids().items()}
        self._spec = spec
        self._context = context
        ranks_by_pid = {pid: rank for rank, pid in self.pids.items()}
        # PContext's own polling ends all ranks with SIGTERM at the first death; survivors are to report first.
        self._running: dict[int, BaseProcess] = {
            ranks_by_pid[process.pid]: process
            for process in multiprocessing.active_children()
            if process.pid in ranks_by_pid
        }
        self._stopped_since: dict[int, float] = {}
        self._died: dict[int, int] = {rank: UNKNOWN_EXIT_CODE for rank in self.pids if rank not in self._running}
        self._next_store_poll_s = 0.0
        self._failure: Failure | None = None
        self._settled = threading.Event()
        self._closing = threading.Event()
        self._is_closed = False
        self._watcher = threading.Thread(target=self._watch, name="argosy-launcher", daemon=True)
        self._watcher.start()
        atexit.register(self.close, grace_s=0.0)

    @classmethod
    def start(cls, entry: Callable[[RankContext], None], spec: LaunchSpec) -> "RankProcesses":
        """Fork this node's ranks; each calls ``entry``, a top-level function. Does not wait for them.

        Raises:
            ValueError: the port is taken, the address is not of this machine, the node's place is taken.
            RuntimeError: node 0 cannot be reached.
        """
        store = _open_store(spec)
        others = set(multiprocessing.active_children())
        processes: RankProcesses | None = None
        try:
            if spec.torchrun is None:
                claim_place(store, "node", spec.node_rank, spec.nnodes)
            with environment_of_ranks():
                start_fork_server(spec.preload)  # seconds of imports, which Ctrl-C may break off
                with _late_signals():  # between a fork and the note of it, nobody could end the rank
                    processes = cls(spec, store, _start_ranks(entry, spec, store.address))
        except BaseException:
            if processes is not None:
                processes.close(grace_s=0.0)
                raise
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            if not others:
                end_fork_server()
            store.close()
            raise
        return processes

    @property
    def is_finished(self) -> bool:
        """Every rank's entry returned."""
        return self._settled.is_set() and self._failure is None

    def poll(self) -> Failure | None:
        """None: nothing went wrong so far. A failure is told once all ranks of this node are gone."""
        return self._failure if self._settled.is_set() else None

    def wait(self, timeout_s: float | None = None) -> Failure | None:
        """Until this node's ranks have ended."""
        self._settled.wait(timeout_s)
        return self.poll()

    def close(self, grace_s: float = 5.0) -> None:
        """End what still runs after ``grace_s``, and free the port. Tell the ranks to stop first."""
        if self._is_closed:
            return
        self._is_closed = True
        deadline = time.monotonic() + grace_s
        self._settled.wait(grace_s)
        if self.is_finished and self._spec.is_store_host:
            self._await_other_nodes(deadline)
        self._closing.set()
        self._watcher.join()
        if self._running:
            self._kill_running()
            self._tell_other_nodes()
        self._context.close(signal.SIGKILL, timeout=5)
        self.store.close()
        atexit.unregister(self.close)

    # --- the watching thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.is_set():
            try:
                cause = self._find_cause()
            except StoreLostError as error:
                self._end_without_store(error)
            else:
                if cause is not None:
                    self._end_all(cause)
            if not self._running:
                self._settled.set()
                return
            self._reap(POLL_S)

    def _reap(self, timeout_s: float) -> None:
        """Take note of ranks that ended; waits until one does, or the time is over."""
        ready = set(wait_for_any([process.sentinel for process in self._running.values()], timeout=timeout_s))
        for rank, process in list(self._running.items()):
            if process.sentinel in ready:
                process.join()
                del self._running[rank]
                if process.exitcode:
                    self._died[rank] = process.exitcode

    def _find_cause(self) -> Abort | None:
        if self._died:
            ranks = tuple(sorted(self._died))
            return Abort(text="; ".join(self._explain_death(rank, self._died[rank]) for rank in ranks), ranks=ranks)
        now = time.monotonic()
        if now < self._next_store_poll_s:
            return None
        self._next_store_poll_s = now + STORE_POLL_S
        stopped = self._find_stopped(now)
        if stopped:
            limit_s = self._spec.collective_timeout_s
            return Abort(text=f"{name_ranks(stopped)} stopped (SIGSTOP) for more than {limit_s:g} s", ranks=stopped)
        return read_root_cause(self.store)

    def _find_stopped(self, now: float) -> tuple[int, ...]:
        stopped = {rank for rank in self._running if _is_stopped(self.pids[rank])}
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        limit_s = self._spec.collective_timeout_s + STOPPED_MARGIN_S
        return tuple(sorted(rank for rank, since_s in self._stopped_since.items() if now - since_s > limit_s))

    def _explain_death(self, rank: int, exit_code: int) -> str:
        who = f"rank {rank} (pid {self.pids[rank]}, node {self._spec.node_rank})"
        if exit_code >= 0:
            return f"{who} exited with code {exit_code}; its output says why"
        name = signal.Signals(-exit_code).name
        hint = ", as the kernel does when memory runs out" if exit_code == -signal.SIGKILL else ""
        return f"{who} was killed by {name}{hint}"

    def _end_without_store(self, error: StoreLostError) -> None:
        """Node 0 is gone; if all ranks have ended well, it left in good order, and only the news of them was late."""
        deadline = time.monotonic() + GRACE_S
        while self._running and not self._died and time.monotonic() < deadline:
            self._reap(POLL_S)
        if self._running or self._died:
            self._end_all(Abort(text=str(error)))

    def _end_all(self, cause: Abort) -> None:
        """Tell everybody, wait for last words, kill. A cause that was published before ours stands."""
        with contextlib.suppress(StoreLostError):
            publish_abort(self.store, cause)
        deadline = time.monotonic() + GRACE_S
        while self._can_speak() and time.monotonic() < deadline:
            self._reap(POLL_S)
        self._kill_running()
        with contextlib.suppress(StoreLostError):
            cause = read_root_cause(self.store) or cause
        self._failure = Failure(cause.text, cause.ranks, cause.is_user_error)

    def _can_speak(self) -> bool:
        """Whether a rank is left that is not stopped."""
        return not all(_is_stopped(self.pids[rank]) for rank in self._running)

    def _kill_running(self) -> None:
        for process in self._running.values():
            process.kill()  # ends stopped processes too
        for process in self._running.values():
            process.join()
        self._running.clear()

    def _tell_other_nodes(self) -> None:
        """Their ranks would wait for ours. They notice a lost store, but under torchrun it outlives us."""
        text = f"the process that started {name_ranks(tuple(self.pids))} was interrupted, or closed its engine"
        with contextlib.suppress(StoreLostError):
            publish_abort(self.store, Abort(text=text, ranks=tuple(self.pids)))

    def _await_other_nodes(self, deadline: float) -> None:
        """The store must outlive the last rank, or that one would report a lost store."""
        with contextlib.suppress(StoreLostError):
            while self.store.add("ended", 0) < self._spec.layout.world_size and time.monotonic() < deadline:
                time.sleep(POLL_S / 4)


class _NoLogs(LogsSpecs):
    """Ranks write to the launching process's own streams; no directory is made."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(nowhere, nowhere, {}, {}, nowhere)

    @property
    def root_log_dir(self) -> str:
        return ""


def _open_store(spec: LaunchSpec) -> RankStore:
    address = spec.store_address
    if spec.is_store_host:
        return host_store(address.host, address.port, address.prefix)
    return connect_store(address, spec.startup_timeout_s)


def _start_ranks(entry: Callable[[RankContext], None], spec: LaunchSpec, address: StoreAddress) -> PContext:
    dump_directory = spec.flight_recorder_dir or default_dump_directory()
    seats = [
        RankSeat(spec, rank, spec.torchrun.local_rank if spec.torchrun else index, address, dump_directory)
        for index, rank in enumerate(spec.local_ranks)
    ]
    with _kept_signal_handler(UNSENT_SIGNAL):
        return start_processes(
            "argosy",
            _become_child,
            args={index: (entry, seat) for index, seat in enumerate(seats)},
            envs={index: {} for index in range(len(seats))},
            logs_specs=_NoLogs(),
            start_method="forkserver",
        )


def _become_child(entry: Callable[[RankContext], None], seat: RankSeat) -> None:
    """In the new process."""
    for number in SHIELDED_SIGNALS:  # a terminal or service manager sends them to all; the launching process decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the fork server has its own use for it
    die_with_launcher()
    run_seat(entry, seat)


@contextlib.contextmanager
def _late_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end. A mask would not do: other threads would take them for this one."""
    if threading.current_thread() is not threading.main_thread():
        yield  # their handlers run in the main thread
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SHIELDED_SIGNALS}
    for number, handler in handlers.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


@contextlib.contextmanager
def _kept_signal_handler(number: signal.Signals) -> Iterator[None]:
    """torch.distributed.elastic installs its own."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


def _is_stopped(pid: int) -> bool:
    """By a signal (state T); False for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"
