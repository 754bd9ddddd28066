"""The engine process from outside and its loop from inside: how it ends, what it refuses, and that its heart beats."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from argosy.engine.replica_messages import (
    AbortRequest,
    AddRequest,
    FinishRequest,
    ReplicaStats,
    Shutdown,
    StepDeltas,
    UpdateSettings,
)
from argosy.engine.wire import AnySpoke, Hub, Spoke
from argosy.messages import FinishReason, TokenDelta
from argosy.sampling_params import SamplingParams
from argosy.server.engine_loop import EngineLoop
from argosy.server.engine_messages import (
    EngineCommand,
    EngineReport,
    EngineSnapshot,
    RequestRefused,
    SubmitRequest,
)
from argosy.server.engine_seat import ENGINE_MODULE, PoolSettings
from tests.helpers.pool_user import PoolUser, processes_of_session

ROOT = Path(__file__).resolve().parents[2]
PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
ONE_STEP_S = 0.02


class PlayedClient:
    """``EngineClient``: one token a step and request; "bad" requests are refused, a "deadly" one fails the engine."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.finished: list[str] = []
        self.waited_s = 0.0
        self._aborted: list[TokenDelta] = []

    def add(self, request: AddRequest, data_parallel_rank: int | None = None) -> None:
        if request.request_id.startswith("bad"):
            raise ValueError(f"{request.request_id} cannot be computed in replica {data_parallel_rank}")
        self.requests.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self.requests.remove(request_id)
        self._aborted.append(TokenDelta(request_id, [], FinishReason.ABORT))

    def finish(self, request_id: str, reason: FinishReason) -> None:
        self.requests.remove(request_id)
        self.finished.append(request_id)

    def step(self, interrupt: AnySpoke | None = None, timeout_s: float = 0.0) -> list[TokenDelta]:
        assert interrupt is not None
        if "deadly" in self.requests:
            raise RuntimeError("the device is on fire")
        if not self.requests and not self._aborted:
            started_s = time.monotonic()
            interrupt.wait(timeout_s)
            self.waited_s += time.monotonic() - started_s
            return []
        time.sleep(ONE_STEP_S)
        aborted, self._aborted = self._aborted, []
        return [*aborted, *(TokenDelta(request_id, [7]) for request_id in self.requests)]

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def update_settings(self, settings: UpdateSettings) -> None:
        raise NotImplementedError

    def collect_stats(self) -> list[ReplicaStats]:
        raise NotImplementedError

    def poll_stats(self, *, has_ranks: bool) -> list[ReplicaStats]:
        return [ReplicaStats(0, 0, 0, 0, 0, 0.0, [], num_running=len(self.requests), num_waiting=int(has_ranks))]

    def close(self) -> None:
        raise NotImplementedError


class LoopStage:
    """A loop in a thread, and the pool's end of its socket."""

    def __init__(self) -> None:
        self.client = PlayedClient()
        self.hub: Hub[EngineCommand, EngineReport] = Hub(msgspec.msgpack.Decoder(EngineReport), None)
        self.spoke: Spoke[EngineReport, EngineCommand] = Spoke(
            msgspec.msgpack.Decoder(EngineCommand), self.hub.address, 0
        )
        self.loop = EngineLoop(self.client, self.spoke)
        self.heard: list[EngineReport] = []
        self.deltas: list[TokenDelta] = []  # all that were told

    def until(self, kind: type, number: int = 1) -> list[EngineReport]:
        """All reports until ``number`` of a kind are among those not asked for before."""
        deadline_s = time.monotonic() + 10.0
        while sum(isinstance(report, kind) for report in self.heard) < number:
            assert time.monotonic() < deadline_s, self.heard
            self.heard += [report for _, report in self.hub.receive(0.1)]
        heard, self.heard = self.heard, []
        self.deltas += [delta for report in heard if isinstance(report, StepDeltas) for delta in report.deltas]
        return [report for report in heard if isinstance(report, kind)]


@pytest.fixture
def stage() -> Iterator[LoopStage]:
    stage = LoopStage()
    yield stage
    stage.hub.close()
    stage.spoke.close()


@contextlib.contextmanager
def running(stage: LoopStage) -> Iterator[None]:
    """The loop runs, until ``Shutdown`` at the end."""
    thread = threading.Thread(target=stage.loop.run)
    thread.start()
    stage.until(EngineSnapshot)  # connected
    yield
    stage.hub.send(0, Shutdown())
    thread.join(5.0)
    assert not thread.is_alive()


def test_commands_reach_the_engine_and_tokens_the_pool(stage: LoopStage) -> None:
    with running(stage):
        stage.hub.send(0, SubmitRequest(AddRequest("a", [1], PARAMS)))
        (first, _) = stage.until(StepDeltas, 2)[:2]
        assert first == StepDeltas([TokenDelta("a", [7])])
        stage.hub.send(0, SubmitRequest(AddRequest("bad", [1], PARAMS), 3))
        assert stage.until(RequestRefused) == [RequestRefused("bad", "bad cannot be computed in replica 3")]
        stage.hub.send(0, SubmitRequest(AddRequest("b", [1], PARAMS)))
        stage.hub.send(0, AbortRequest("a"))
        stage.hub.send(0, FinishRequest("b", FinishReason.STOP))
        while stage.client.finished != ["b"]:
            time.sleep(0.001)
        stage.until(EngineSnapshot, 2)
        assert {delta.request_id for delta in stage.deltas} >= {"a"}
        assert all(delta.finish_reason is None for delta in stage.deltas)  # the pool knows what it has aborted


def test_an_idle_engine_beats_and_wakes_at_once(stage: LoopStage) -> None:
    with running(stage):
        started_s = time.monotonic()
        beats = [report for report in stage.until(EngineSnapshot, 4) if isinstance(report, EngineSnapshot)]
        assert 1.2 < time.monotonic() - started_s < 4.0
        assert all(not beat.has_work and beat.num_commands == 0 for beat in beats)
        assert sum(beat.num_waiting for beat in beats) == 1  # every fourth has the ranks' counters
        sent_s = time.monotonic()
        stage.hub.send(0, SubmitRequest(AddRequest("a", [1], PARAMS)))
        stage.until(StepDeltas)
        assert time.monotonic() - sent_s < ONE_STEP_S + 0.2
        beats = [report for report in stage.until(EngineSnapshot, 2) if isinstance(report, EngineSnapshot)]
        assert beats[-1].has_work and beats[-1].num_commands == 1 and beats[-1].num_running == 1
        assert stage.client.waited_s > 1.0  # it slept while it had nothing to do


def test_an_engine_that_fails_ends_the_loop(stage: LoopStage) -> None:
    stage.client.requests.append("deadly")
    with pytest.raises(RuntimeError, match="on fire"):
        stage.loop.run()


def test_the_program_alone_says_who_starts_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", ENGINE_MODULE], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "this program is started by the server" in done.stderr
    assert "Traceback" not in done.stderr


SERVER = textwrap.dedent(
    """
    import asyncio, os, sys
    from tests.helpers.pool_user import PoolUser, children_of

    async def main():
        user = PoolUser()
        start = asyncio.ensure_future(user.start(**{settings}))
        if {is_early}:
            while not children_of(os.getpid()):
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)  # into its imports
            print(*children_of(os.getpid()), flush=True)
        else:
            await start
            print(*user.note_pids(), flush=True)
        assert "torch" not in sys.modules
        await asyncio.sleep(600)

    asyncio.run(main())
    """
)


@pytest.mark.processes
@pytest.mark.parametrize("is_early", [True, False], ids=["while it starts", "when it is ready"])
@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"dp_size": 2}, marks=pytest.mark.slow)], ids=["one rank", "many ranks"]
)
def test_nothing_outlives_a_killed_server(settings: dict[str, object], is_early: bool) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(settings=settings, is_early=is_early)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert server.stdout is not None
    pids = [int(text) for text in server.stdout.readline().split()]
    assert pids and all(processes_of_session(pid) for pid in pids)
    server.kill()
    server.wait()
    deadline_s = time.monotonic() + 5.0
    while any(processes_of_session(pid) for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_rank_ends_its_engine_whose_requests_go_on() -> None:
    """Replicas that share experts are one engine: it starts again, and the tokens are the same."""

    async def run() -> None:
        user = await PoolUser().start(PoolSettings(), dp_size=2)
        try:
            assert user.pool.description.dp_size == 2
            for i in range(4):
                user.submit(f"r{i}", [50 + i] * 9, PARAMS, i % 2)
            await user.wait_for_all()
            expected, user.tokens = user.tokens, {}
            user.forget()
            for i in range(4):
                user.submit(f"r{i}", [50 + i] * 9, PARAMS)
            await user.wait(lambda: all(len(tokens) > 5 for tokens in user.tokens.values()))
            (engine,) = user.note_pids()
            family = processes_of_session(engine)
            servers = {pid for pid, parent in family.items() if parent == engine}
            ranks = [pid for pid, parent in family.items() if parent in servers]
            assert len(ranks) == 2
            os.kill(ranks[1], signal.SIGKILL)
            noticed_s = await user.wait(lambda: not user.pool.is_ready)
            assert noticed_s < 8.0
            await user.wait_for_all()
            assert user.tokens == expected and user.refusals == {}
            assert "was killed by SIGKILL" in user.pool.engines[0].last_message or user.pool.is_ready
            assert user.pool.num_replays == 4
            await user.wait(lambda: (snapshot := user.pool.engines[0].snapshot) is not None and bool(snapshot.replicas))
            snapshot = user.pool.engines[0].snapshot
            assert snapshot is not None and len(snapshot.replicas) == 2
        finally:
            await user.pool.aclose(10.0)
        assert not [pid for pid in user.pids if processes_of_session(pid)]

    asyncio.run(run())
