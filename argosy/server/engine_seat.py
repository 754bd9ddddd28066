"""One engine's place in the pool: its process is started there, watched, ended when it is stuck, and started again.

What becomes of its requests is the pool's business, which is told when the engine is ready, lost, or given up. Every
start has a number of its own, its *peer*; what an earlier one still says is not heard. Invariant: a seat that is not
``ready`` has no requests, and one that has been closed has no process.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from argosy.config import EngineConfig
from argosy.engine.replica_messages import Shutdown, StepDeltas
from argosy.engine.wire import WireAddress
from argosy.server.child_process import ChildProcess, is_stopped
from argosy.server.engine_messages import (
    EngineCommand,
    EngineDescription,
    EngineFailed,
    EngineLaunch,
    EngineReady,
    EngineReport,
    EngineSnapshot,
    EngineStarted,
    StartStage,
    SubmitRequest,
)
from argosy.server.stopped_processes import StoppedProcesses

EngineState = Literal["starting", "ready", "restarting", "failed"]

ENGINE_MODULE = "argosy.server.engine_process"
NO_PEER = -1
_TICK_S = 0.5
_LATE_S = 2.0  # a tick that comes so much later says that this process itself could not run
_IDLE_SILENCE_S = 10.0  # an idle engine says something every half second
_LAST_NEWS_S = 0.1  # from the end of a process to that of what is heard of it
_LAST_WORDS_S = 2.0  # for a process that has said why it ends, to end
_NUM_START_PHASES = 6  # each bounded by startup_timeout_s in the engine itself, which can say more
_MAX_BACKOFF_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSettings:
    """How much patience the pool has."""

    stuck_after_s: float = 60.0  # an engine with work that reports no progress for so long; must exceed a long step
    max_restarts: int = 5  # an engine that ends more often within the window is given up
    restart_window_s: float = 600.0
    max_replays: int = 3  # of one request, which may be what its engines die of

    def __post_init__(self) -> None:
        for name in ("stuck_after_s", "restart_window_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a number of seconds > 0, got {getattr(self, name)!r}")
        for name in ("max_restarts", "max_replays"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """One engine, for people and metrics."""

    index: int
    state: EngineState
    pid: int | None  # None: between two processes
    num_restarts: int
    since_s: float  # time.monotonic at which the state began
    last_message: str  # why it ended last, or what it does to start
    snapshot: EngineSnapshot | None  # None while not ready
    num_requests: int


class Process(Protocol):
    """An engine's process as a seat uses it; ``ChildProcess`` is the real one."""

    @property
    def pid(self) -> int: ...

    @property
    def gone(self) -> "asyncio.Future[None]":
        """Nothing of it is left."""
        ...

    def kill(self) -> None: ...


# First words, name, and what to call with what became of the process.
StartProcess = Callable[[bytes, str, Callable[[str], None]], Process]


def start_engine_process(first_words: bytes, name: str, on_exit: Callable[[str], None]) -> Process:
    return ChildProcess(ENGINE_MODULE, first_words, name, on_exit)


class SeatPool(Protocol):
    """What a seat needs of its pool."""

    def send(self, peer: int, command: EngineCommand) -> None: ...

    def drain(self) -> None: ...

    def seat_ready(self, seat: "EngineSeat") -> None: ...

    def seat_lost(self, seat: "EngineSeat", reason: str) -> None: ...

    def seat_failed(self, seat: "EngineSeat") -> None: ...

    def progress(self, seat: "EngineSeat", stage: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _End:
    """Why a process is given up."""

    reason: str
    is_user_error: bool = False
    is_its_own: bool = False  # the process has said so itself, and is about to exit


class EngineSeat:
    """Call ``start`` once, then ``hear`` with every report of ``peer``."""

    def __init__(
        self,
        index: int,
        config: EngineConfig,
        settings: PoolSettings,
        address: WireAddress,
        next_peer: Callable[[], int],
        pool: SeatPool,
        start_process: StartProcess,
    ) -> None:
        self.index = index
        self.state: EngineState = "starting"
        self.peer = NO_PEER
        self.description: EngineDescription | None = None
        self.last_message = "not started yet"
        self.num_restarts = 0
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._config = config
        self._settings = settings
        self._address = address
        self._next_peer = next_peer
        self._pool = pool
        self._start_process = start_process
        self._since_s = time.monotonic()
        self._snapshot: EngineSnapshot | None = None
        self._process: Process | None = None
        self._over: asyncio.Future[_End] | None = None
        self._ends_s: deque[float] = deque()  # when processes ended, within the window
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None
        self._progress_s = 0.0  # when the engine last reported progress, or got work after it had none
        self._heard_s = 0.0
        self._has_work = False  # as far as is known: by what was sent, and what was said after it
        self._num_commands = 0  # sent to this process

    def start(self) -> None:
        """Returns at once; ``first_ready`` tells when the engine is ready, or why it cannot be."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"engine {self.index}")

    def status(self, num_requests: int) -> EngineStatus:
        return EngineStatus(
            index=self.index,
            state=self.state,
            pid=None if self._process is None else self._process.pid,
            num_restarts=self.num_restarts,
            since_s=self._since_s,
            last_message=self.last_message,
            snapshot=self._snapshot,
            num_requests=num_requests,
        )

    def send(self, command: EngineCommand) -> None:
        """Raises RuntimeError: the process is gone; its end is noticed by itself."""
        self._num_commands += 1
        if isinstance(command, SubmitRequest) and not self._has_work:
            self._has_work = True
            self._progress_s = time.monotonic()
        self._pool.send(self.peer, command)

    def hear(self, report: EngineReport) -> None:
        self._heard_s = time.monotonic()
        match report:
            case StepDeltas():
                self._progress_s = self._heard_s
            case EngineSnapshot():
                self._take_snapshot(report)
            case EngineStarted(pid):
                self.last_message = f"process {pid} has started"
            case StartStage(stage, done, total):
                self.last_message = f"{stage}: {done} of {total}" if total else stage
                self._pool.progress(self, stage, done, total)
            case EngineReady(description):
                self._become_ready(description)
            case EngineFailed(message, is_user_error):
                _settle(self._over, _End(message, is_user_error, is_its_own=True))

    def end(self, reason: str) -> None:
        """Give the process up; the first reason counts."""
        _settle(self._over, _End(reason))

    async def aclose(self, timeout_s: float) -> None:
        """Returns when no process is left."""
        self._is_closing = True
        process = self._process
        if process is not None:
            with contextlib.suppress(RuntimeError):
                if timeout_s > 0 and self.state == "ready":
                    self._pool.send(self.peer, Shutdown())
                    await asyncio.wait((process.gone,), timeout=timeout_s)
            process.kill()
        self.end("the server ends")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if process is not None:
            await process.gone
        if self.first_ready.done() and not self.first_ready.cancelled():
            self.first_ready.exception()  # seen: another seat's error may have been the one that was raised
        self.first_ready.cancel()

    # --- its life -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._is_closing:
            end = await self._live()
            if self._is_closing:
                return
            if not self.first_ready.done():
                self.first_ready.set_exception(_as_error(end))
                self._set_state("failed", end.reason)
                return
            self.num_restarts += 1
            num_ends = self._count_end()
            if num_ends > self._settings.max_restarts:
                window_s = self._settings.restart_window_s
                self._set_state("failed", f"{end.reason} (given up: {num_ends} ends within {window_s:g} s)")
                _log.error("engine %d is given up: %s", self.index, self.last_message)
                self._pool.seat_failed(self)
                return
            await asyncio.sleep(min(0.5 * 2 ** (num_ends - 2), _MAX_BACKOFF_S) if num_ends > 1 else 0.0)

    async def _live(self) -> _End:
        """One process from its start until nothing of it is left."""
        over: asyncio.Future[_End] = asyncio.get_running_loop().create_future()
        self._over = over
        self.peer = self._next_peer()
        self._heard_s = self._progress_s = time.monotonic()
        self._has_work = False
        self._num_commands = 0
        launch = EngineLaunch(config=self._config, address=self._address, peer=self.peer)
        try:
            process = self._start_process(msgspec.msgpack.encode(launch), f"engine {self.index}", self._process_exited)
        except OSError as error:  # no memory, no processes left
            return _End(f"engine {self.index} cannot be started: {error}")
        self._process = process
        try:
            await self._watch(over)
            end = over.result()
            self._lose(end.reason)
            if end.is_its_own:
                await asyncio.wait((process.gone,), timeout=_LAST_WORDS_S)
        finally:
            process.kill()
            await asyncio.shield(process.gone)
            self._process = None
        return end

    async def _watch(self, over: "asyncio.Future[_End]") -> None:
        """Until the process is over, by its own word, by its exit, or because it is stuck."""
        assert self._process is not None
        stopped = StoppedProcesses(self._process.pid)
        tick_s = time.monotonic()
        while not over.done():
            await asyncio.wait((over,), timeout=_TICK_S)
            self._pool.drain()  # NOTE(order): what it has said counts before what it is silent about
            now_s = time.monotonic()
            if now_s - tick_s > _TICK_S + _LATE_S:  # so it was us: whatever is on its way gets the time to arrive
                self._heard_s = self._progress_s = now_s
                stopped = StoppedProcesses(self._process.pid)
            tick_s = now_s
            if (complaint := stopped.complain(now_s, self._settings.stuck_after_s)) is not None:
                self._give_up_on_it(f": {complaint}", now_s)
            self._check_silence(now_s)

    def _check_silence(self, now_s: float) -> None:
        assert self._process is not None
        limit_s, since_s, what = self._patience()
        if now_s - since_s <= limit_s:
            return
        stopped = " (it is stopped by a signal)" if is_stopped(self._process.pid) else ""
        self._give_up_on_it(f"{stopped} {what} for {now_s - since_s:.1f} s, at most {limit_s:g} s are allowed", now_s)

    def _give_up_on_it(self, why: str, now_s: float) -> None:
        assert self._process is not None
        self.end(
            f"engine {self.index} (pid {self._process.pid}){why}; "
            f"last heard {now_s - self._heard_s:.1f} s ago: {self._describe_last()}"
        )

    def _patience(self) -> tuple[float, float, str]:
        """How long may pass since when without what."""
        stuck_after_s = self._settings.stuck_after_s
        if self.state != "ready":
            config = self._config
            limit_s = config.startup_timeout_s * _NUM_START_PHASES + config.weights_timeout_s
            return limit_s, max(self._since_s, self._progress_s), "was not ready"
        if self._has_work:
            return stuck_after_s, self._progress_s, "made no progress with its requests"
        return min(stuck_after_s, _IDLE_SILENCE_S), self._heard_s, "said nothing"

    def _describe_last(self) -> str:
        snapshot = self._snapshot
        if snapshot is None:
            return self.last_message
        return f"step {snapshot.num_steps}, {snapshot.num_running} requests running and {snapshot.num_waiting} waiting"

    def _process_exited(self, what: str) -> None:
        """Its last words may still be on the way, and say more."""
        asyncio.get_running_loop().call_later(_LAST_NEWS_S, _settle, self._over, _End(what))

    def _become_ready(self, description: EngineDescription) -> None:
        self.description = description
        self._set_state("ready", f"ready after {description.start_s:.1f} s")
        _log.info("engine %d is ready (pid %s)", self.index, self._process and self._process.pid)
        if not self.first_ready.done():
            self.first_ready.set_result(None)
        self._pool.seat_ready(self)

    def _lose(self, reason: str) -> None:
        was_ready = self.state == "ready"
        self.peer = NO_PEER
        self._snapshot = None
        if self.first_ready.done():
            self._set_state("restarting", reason)
        else:
            self.last_message = reason
        if not self._is_closing and self.first_ready.done():
            _log.error("engine %d is lost and starts again: %s", self.index, reason)
        if was_ready:
            self._pool.seat_lost(self, reason)

    def _take_snapshot(self, snapshot: EngineSnapshot) -> None:
        before = self._snapshot
        if before is None or _num_steps(before) != _num_steps(snapshot):
            self._progress_s = self._heard_s
        if snapshot.num_commands == self._num_commands:  # else more work may be on its way
            self._has_work = snapshot.has_work
        self._snapshot = snapshot if before is None else _keep_ranks(before, snapshot)

    def _set_state(self, state: EngineState, message: str) -> None:
        self.state = state
        self.last_message = message
        self._since_s = time.monotonic()

    def _count_end(self) -> int:
        """Of processes within the window, this one included."""
        now_s = time.monotonic()
        self._ends_s.append(now_s)
        while self._ends_s[0] < now_s - self._settings.restart_window_s:
            self._ends_s.popleft()
        return len(self._ends_s)


def _settle(over: "asyncio.Future[_End] | None", end: _End) -> None:
    if over is not None and not over.done():
        over.set_result(end)


def _num_steps(snapshot: EngineSnapshot) -> int:
    return snapshot.num_steps + snapshot.num_dummy_steps


def _keep_ranks(before: EngineSnapshot, snapshot: EngineSnapshot) -> EngineSnapshot:
    """Ranks tell their counters at a slower beat; until then the last ones stand."""
    if len(before.replicas) != len(snapshot.replicas):
        return snapshot
    replicas = [
        new if new.ranks else msgspec.structs.replace(new, ranks=old.ranks)
        for old, new in zip(before.replicas, snapshot.replicas, strict=True)
    ]
    return msgspec.structs.replace(snapshot, replicas=replicas)


def _as_error(end: _End) -> Exception:
    return ValueError(end.reason) if end.is_user_error else RuntimeError(end.reason)
