"""What the pool promises when engines die at the worst moment: engines are played by the test, sockets are real."""

import asyncio
from collections.abc import Callable, Coroutine

import msgspec
import pytest

from argosy.config import EngineConfig
from argosy.engine.replica_messages import (
    AbortRequest,
    AddRequest,
    FinishRequest,
    RankStats,
    ReplicaStats,
    Shutdown,
    StepDeltas,
)
from argosy.engine.wire import Spoke
from argosy.messages import FinishReason, TokenDelta
from argosy.sampling_params import SamplingParams
from argosy.server.engine_messages import (
    EngineCommand,
    EngineDescription,
    EngineFailed,
    EngineLaunch,
    EngineReady,
    EngineReport,
    EngineSnapshot,
    RequestRefused,
    StartStage,
    SubmitRequest,
)
from argosy.server.engine_pool import EnginePool, NoEngineError, PoolSettings

PARAMS = SamplingParams(max_tokens=100)
WAIT_S = 10.0


class PlayedEngine:
    """A process that does what the test says."""

    def __init__(self, pid: int, first_words: bytes, name: str, on_exit: Callable[[str], None]) -> None:
        self.pid = pid
        self.name = name
        self.launch = msgspec.msgpack.decode(first_words, type=EngineLaunch)
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.commands: list[EngineCommand] = []
        self._on_exit = on_exit
        self._has_exited = False
        self._spoke: Spoke[EngineReport, EngineCommand] = Spoke(
            msgspec.msgpack.Decoder(EngineCommand), self.launch.address, self.launch.peer
        )

    def say(self, *reports: EngineReport) -> None:
        for report in reports:
            self._spoke.send(report)

    def become_ready(self) -> None:
        config = self.launch.config
        self.say(EngineReady(EngineDescription(64, 9, 9, 4, "x", "float32", "float32", config.dp_size, 1, 1, 0.1)))

    def say_tokens(self, request_id: str, *token_ids: int, end: FinishReason | None = None, cached: int = 0) -> None:
        self.say(StepDeltas([TokenDelta(request_id, list(token_ids), end, num_cached_tokens=cached)]))

    async def hear(self, number: int = 1) -> list[EngineCommand]:
        """Until ``number`` commands have arrived since the last call."""
        heard: list[EngineCommand] = []
        async with asyncio.timeout(WAIT_S):
            while len(heard) < number:
                heard += self._spoke.receive(waits=False)
                await asyncio.sleep(0.001)
        assert len(heard) == number, heard
        return heard

    async def hear_request(self) -> AddRequest:
        (command,) = await self.hear()
        assert isinstance(command, SubmitRequest)
        return command.request

    def exit(self) -> None:
        """Its words and what it has started may outlive it."""
        if not self._has_exited:
            self._has_exited = True
            self._on_exit(f"{self.name} (pid {self.pid}) died")

    def die(self) -> None:
        if not self.gone.done():
            self._spoke.close()
            self.exit()
            self.gone.set_result(None)

    kill = die


class Stage:
    """A pool, its played engines in the order of their starts, and what the pool said."""

    def __init__(self, settings: PoolSettings, **config: object) -> None:
        self.engines: list[PlayedEngine] = []
        self.tokens: dict[str, list[int]] = {}
        self.ends: list[str] = []
        self.deltas: list[TokenDelta] = []
        self.refusals: list[tuple[str, str, bool]] = []
        self.progress: list[tuple[str, int, int]] = []
        self._settings = settings
        self._config = EngineConfig(**config)  # type: ignore[arg-type]
        self.pool: EnginePool

    async def open(self) -> "Stage":
        start = asyncio.ensure_future(self.start())
        while len(self.engines) < (1 if self._config.ep_size is None else self._config.dp_size):
            await asyncio.sleep(0)
        for engine in self.engines:
            engine.become_ready()
        self.pool = await start
        self._num_met = len(self.engines)
        return self

    def start(self) -> Coroutine[object, object, EnginePool]:
        return EnginePool.start(
            self._config,
            self._settings,
            deliver=self._deliver,
            refuse=lambda *refusal: self.refusals.append(refusal),
            on_progress=lambda *progress: self.progress.append(progress),
            start_process=self._start_process,
        )

    def submit(self, request_id: str, prompt: list[int], replica: int | None = None) -> None:
        self.pool.submit(AddRequest(request_id, prompt, PARAMS), replica)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.001)

    async def next_engine(self) -> PlayedEngine:
        """In the order of their starts, after those that were there when the pool opened."""
        await self.until(lambda: len(self.engines) > self._num_met)
        self._num_met += 1
        return self.engines[self._num_met - 1]

    def _start_process(self, first_words: bytes, name: str, on_exit: Callable[[str], None]) -> PlayedEngine:
        self.engines.append(PlayedEngine(len(self.engines), first_words, name, on_exit))
        return self.engines[-1]

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.deltas.append(delta)
            self.tokens.setdefault(delta.request_id, []).extend(delta.new_token_ids)
            if delta.finish_reason is not None:
                self.ends.append(delta.request_id)


def play(
    scene: Callable[[Stage], Coroutine[object, object, None]],
    settings: PoolSettings | None = None,
    **config: object,
) -> None:
    """A scene with a pool whose engines are ready; by default two."""

    async def run() -> None:
        stage = await Stage(settings or PoolSettings(), **(config or {"dp_size": 2, "ep_size": 1})).open()
        try:
            await scene(stage)
        finally:
            await stage.pool.aclose(0.0)
        assert all(engine.gone.done() for engine in stage.engines)

    asyncio.run(run())


def test_a_request_goes_on_behind_the_tokens_that_were_delivered() -> None:
    async def scene(stage: Stage) -> None:
        first, second = stage.engines
        stage.submit("r", [1, 2])
        request = await first.hear_request()
        assert request.output_token_ids == [] and request.prompt_token_ids == [1, 2]
        first.say_tokens(request.request_id, 5, 6, cached=1)
        first.say_tokens(request.request_id, 7, cached=1)
        first.die()  # its last words are on the way
        again = await second.hear_request()
        assert again == msgspec.structs.replace(request, output_token_ids=[5, 6, 7])
        second.say_tokens(again.request_id, 8, end=FinishReason.STOP, cached=4)
        await stage.until(lambda: stage.ends == ["r"])
        assert stage.tokens == {"r": [5, 6, 7, 8]}
        assert [delta.num_cached_tokens for delta in stage.deltas][-1] == 1  # as the request found it, not its replay
        assert stage.pool.num_requests == 0 and stage.pool.num_replays == 1

    play(scene)


def test_nothing_is_heard_of_an_engine_that_was_given_up() -> None:
    async def scene(stage: Stage) -> None:
        first, second = stage.engines
        stage.submit("r", [1])
        request = await first.hear_request()
        first.say(EngineFailed("it is broken"))  # and goes on talking
        again = await second.hear_request()
        first.say_tokens(request.request_id, 66, end=FinishReason.STOP)
        second.say_tokens(again.request_id, 5)
        await stage.until(lambda: bool(stage.tokens))
        await asyncio.sleep(0.05)
        assert stage.tokens == {"r": [5]} and stage.ends == []
        assert stage.pool.engines[0].last_message == "it is broken"

    play(scene)


def test_what_an_engine_said_before_it_exited_is_heard_after() -> None:
    async def scene(stage: Stage) -> None:
        first, second = stage.engines
        stage.submit("r", [1], 0)
        request = await first.hear_request()
        first.exit()
        first.say_tokens(request.request_id, 5, 6)
        first.say(EngineFailed("the device is on fire"))
        assert (await second.hear_request()).output_token_ids == [5, 6]
        assert stage.pool.engines[0].last_message == "the device is on fire"
        first.die()

    play(scene)


def test_late_news_of_an_ended_request_is_not_its_successors() -> None:
    async def scene(stage: Stage) -> None:
        engine = stage.engines[0]
        stage.submit("r", [1], 0)
        old = await engine.hear_request()
        stage.pool.abort("r")
        stage.submit("r", [2], 0)
        abort, new = await engine.hear(2)
        assert abort == AbortRequest(old.request_id)
        assert isinstance(new, SubmitRequest) and new.request.request_id != old.request_id
        engine.say_tokens(old.request_id, 66, end=FinishReason.LENGTH)
        engine.say_tokens(new.request.request_id, 5)
        await stage.until(lambda: bool(stage.tokens))
        assert stage.tokens == {"r": [5]}
        stage.pool.finish("r", FinishReason.STOP)
        assert await engine.hear() == [FinishRequest(new.request.request_id, FinishReason.STOP)]
        stage.pool.finish("r", FinishReason.STOP)
        stage.pool.abort("unknown")
        assert stage.pool.num_requests == 0

    play(scene)


def test_requests_go_where_the_fewest_tokens_are_or_where_they_are_sent() -> None:
    async def scene(stage: Stage) -> None:
        first, second = stage.engines
        stage.submit("a", [1] * 10)
        stage.submit("b", [1] * 3)
        stage.submit("c", [1] * 3)
        stage.submit("d", [1], 0)
        prompts = [[len(each.request.prompt_token_ids) for each in await engine.hear(2)] for engine in (first, second)]  # type: ignore[union-attr]
        assert prompts == [[10, 1], [3, 3]]
        assert [each.num_requests for each in stage.pool.engines] == [2, 2]

    play(scene)


def test_a_request_that_kills_engines_is_given_up() -> None:
    async def scene(stage: Stage) -> None:
        stage.submit("deadly", [1])
        engine = stage.engines[0]
        for number in range(3):
            request = await engine.hear_request()
            engine.say_tokens(request.request_id, number)
            engine.die()
            if number < 2:
                engine = await stage.next_engine()
                engine.become_ready()
        await stage.until(lambda: bool(stage.refusals))
        ((request_id, message, is_users_fault),) = stage.refusals
        assert request_id == "deadly" and not is_users_fault
        assert message.startswith("3 engines ended while they computed this request; the last: engine 0 (pid 2) died")
        assert stage.tokens == {"deadly": [0, 1, 2]}
        assert stage.pool.num_requests == 0

    play(scene, PoolSettings(max_replays=2), dp_size=1)


def test_requests_wait_for_the_only_engine_and_are_aborted_meanwhile() -> None:
    async def scene(stage: Stage) -> None:
        stage.submit("a", [1])
        stage.submit("b", [2])
        await stage.engines[0].hear(2)
        stage.engines[0].die()
        await stage.until(lambda: not stage.pool.is_ready)
        with pytest.raises(NoEngineError, match="engine 0 is restarting; try again"):
            stage.submit("c", [3])
        stage.pool.abort("a")
        engine = await stage.next_engine()
        engine.become_ready()
        assert (await engine.hear_request()).prompt_token_ids == [2]
        assert stage.pool.engines[0].num_restarts == 1

    play(scene, dp_size=1)


def test_an_engine_that_ends_too_often_is_given_up_and_its_requests_go_to_the_other() -> None:
    async def scene(stage: Stage) -> None:
        first, second = stage.engines
        stage.submit("r", [1], 0)
        await first.hear()
        first.die()
        assert (await second.hear_request()).prompt_token_ids == [1]
        await stage.until(lambda: stage.pool.engines[0].state == "failed")
        assert "given up: 1 ends within 600 s" in stage.pool.engines[0].last_message
        with pytest.raises(NoEngineError, match="engine 0 is failed"):
            stage.submit("s", [1], 0)
        stage.submit("s", [1])
        assert stage.pool.is_ready
        second.die()
        await stage.until(lambda: len(stage.refusals) == 2)
        assert all("no engine is left: engine 1 (pid 1) died" in message for _, message, _ in stage.refusals)

    play(scene, PoolSettings(max_restarts=0), dp_size=2, ep_size=1)


def test_only_progress_counts_while_there_is_work() -> None:
    """An engine that beats but computes nothing is stuck; one that is idle, or goes on, is not."""

    def beat(engine: PlayedEngine, num_commands: int, num_steps: int, *, has_work: bool) -> None:
        replica = ReplicaStats(num_steps, 0, 0, 0, 0, 0.0, [])
        engine.say(EngineSnapshot(0.0, num_commands, has_work, [replica]))

    async def scene(stage: Stage) -> None:
        (engine,) = stage.engines
        beat(engine, 0, 0, has_work=False)
        stage.submit("r", [1])
        await engine.hear()
        for step in range(10):  # twice the limit
            beat(engine, 1, step, has_work=True)
            await asyncio.sleep(0.2)
        assert stage.pool.engines[0].state == "ready"
        stage.pool.abort("r")
        for _ in range(10):
            beat(engine, 2, 10, has_work=False)
            await asyncio.sleep(0.2)
        assert stage.pool.engines[0].state == "ready"
        stage.submit("s", [1])
        for _ in range(20):
            if not engine.gone.done():
                beat(engine, 2, 10, has_work=False)  # it has not heard of the request
            await asyncio.sleep(0.1)
        status = stage.pool.engines[0]
        assert status.num_restarts == 1 and len(stage.engines) == 2, status
        assert "engine 0 (pid 0) made no progress with its requests for" in status.last_message
        assert "at most 1 s are allowed; last heard" in status.last_message

    play(scene, PoolSettings(stuck_after_s=1.0), dp_size=1)


def test_a_refusal_is_the_users_fault_only_before_anything_died() -> None:
    async def scene(stage: Stage) -> None:
        first, second = stage.engines
        stage.submit("a", [1], 0)
        first.say(RequestRefused((await first.hear_request()).request_id, "too long"))
        await stage.until(lambda: stage.refusals == [("a", "too long", True)])
        stage.submit("b", [1], 0)
        await first.hear()
        first.die()
        second.say(RequestRefused((await second.hear_request()).request_id, "no room"))
        await stage.until(lambda: stage.refusals[1:] == [("b", "no room", False)])
        assert stage.pool.num_requests == 0

    play(scene)


def test_ranks_tell_their_counters_at_a_slower_beat() -> None:
    async def scene(stage: Stage) -> None:
        (engine,) = stage.engines
        with_ranks = ReplicaStats(1, 0, 0, 0, 0, 0.0, [RankStats(0, {"ep": {"x": 7}}, [[1, 2]])])
        without = ReplicaStats(2, 0, 0, 0, 0, 0.0, [])
        engine.say(EngineSnapshot(0.0, 0, False, [with_ranks]), EngineSnapshot(0.5, 0, False, [without]))
        await stage.until(lambda: (snapshot := stage.pool.engines[0].snapshot) is not None and snapshot.num_steps == 2)
        snapshot = stage.pool.engines[0].snapshot
        assert snapshot is not None
        summary = snapshot.summarize_ranks(1)
        assert summary is not None and summary.bytes_sent == {"ep": 7}

    play(scene, dp_size=1)


def test_a_failed_start_ends_all_processes_and_keeps_the_engines_words() -> None:
    async def run() -> None:
        stage = Stage(PoolSettings(), dp_size=2, ep_size=1)
        start = asyncio.ensure_future(stage.start())
        await stage.until(lambda: len(stage.engines) == 2)
        stage.engines[0].become_ready()
        stage.engines[1].say(StartStage("loading weights", 3, 9), EngineFailed("no such file", True))
        with pytest.raises(ValueError, match="^no such file$"):
            await start
        assert stage.progress == [("engine 1: loading weights", 3, 9)]
        assert all(engine.gone.done() for engine in stage.engines)

    asyncio.run(run())


def test_engines_are_told_to_end_and_given_time() -> None:
    async def run() -> None:
        stage = await Stage(PoolSettings(), dp_size=2, ep_size=1).open()
        stage.submit("r", [1], 0)
        await stage.engines[0].hear()
        close = asyncio.ensure_future(stage.pool.aclose(WAIT_S))
        for engine in stage.engines:
            assert await engine.hear() == [Shutdown()]
            await asyncio.sleep(0.02)
            assert not close.done()
            engine.die()
        await close
        assert len(stage.engines) == 2 and stage.refusals == []
        await stage.pool.aclose(WAIT_S)

    asyncio.run(run())


def test_a_pool_whose_caller_fails_goes_on() -> None:
    """A caller's error reaches the event loop's handler, and the tokens after it their request."""

    async def scene(stage: Stage) -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
        (engine,) = stage.engines
        stage.submit("r", [1])
        request = await engine.hear_request()
        stage.tokens["r"] = None  # type: ignore[assignment]
        engine.say_tokens(request.request_id, 1)
        await stage.until(lambda: bool(errors))
        stage.tokens["r"] = []
        engine.say_tokens(request.request_id, 2, end=FinishReason.STOP)
        await stage.until(lambda: stage.ends == ["r"])
        assert isinstance(errors[0], AttributeError)

    play(scene, dp_size=1)


@pytest.mark.parametrize("changes", [{"stuck_after_s": 0.0}, {"max_restarts": -1}, {"max_replays": -1}])
def test_settings_that_cannot_work_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        PoolSettings(**changes)  # type: ignore[arg-type]
