"""What the server promises under load and faults: the scenarios of ``benchmarks/server_faults``, small ones."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from argosy.engine.prompts import CheckedPrompt
from argosy.messages import FinishReason
from argosy.sampling_params import SamplingParams
from argosy.server import run
from argosy.server.engine_messages import RequestRefused
from argosy.server.engine_pool import PoolSettings
from argosy.server.errors import ApiError
from argosy.server.outputs import Submission
from benchmarks.server_faults.client import Answer
from benchmarks.server_faults.disconnects import STAGES, leave
from benchmarks.server_faults.load import ask_all, mix
from benchmarks.server_faults.questions import Ask, Questions
from benchmarks.server_faults.server import Server
from tests.server.test_pool_rules import Stage, play


@pytest.mark.processes
@pytest.mark.e2e
def test_a_crowd_gets_the_tokens_of_offline_while_others_leave() -> None:
    """And no cache block is left, nor any process."""
    questions = Questions(8, 16, max_sums=4)

    async def leave_all(server: Server) -> None:
        for i in range(3 * len(STAGES)):
            ask = questions.ask(i, 16, ignores_eos=True, is_streamed=i % 2 > 0)
            ask = replace(ask, body=ask.body | {"max_tokens": 2000})  # for long, if nobody ended it
            await leave(server, ask, STAGES[i % len(STAGES)], is_rude=i % 3 > 0)

    async def scene(server: Server) -> None:
        asks = mix(questions, 48, 16)
        (answers, problems), _ = await asyncio.gather(ask_all(server, asks, 32), leave_all(server))
        assert problems == [] and len(answers) == 48
        async with asyncio.timeout(5.0):
            while await server.metric('cache_blocks state="used"') or await server.metric("engine_requests"):
                await asyncio.sleep(0.02)

    server = Server("--max-num-seqs", "16")
    try:
        asyncio.run(scene(server))
        assert server.end() == (0, [])
    finally:
        server.kill()


def test_answers_that_are_wrong_are_found_out() -> None:
    """The judge of all those scenarios."""
    ask = Ask({}, [1, 2, 3], "length")
    assert ask.judge(Answer(200, [1, 2, 3], ["length"])) == ""
    for token_ids, ends in (([1, 2], ["length"]), ([1, 2, 3, 3], ["length"]), ([1, 2, 3], ["stop"]), ([1, 2, 3], [])):
        assert ask.judge(Answer(200, token_ids, ends))
    assert ask.judge(Answer(200, [1, 2, 3], ["length"], problem="no end")) == "no end"


def test_a_second_signal_cuts_off_what_runs(stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not its echo: programs in between may pass on what the terminal sends to all."""
    monkeypatch.setattr(run, "_ECHO_S", 0.2)
    stand.pool.is_held = True

    async def scene() -> None:
        signals = run._StopSignals()
        submission = Submission(
            request_id="a", prompt=CheckedPrompt("hi", [5]), params=SamplingParams(), is_streamed=False
        )
        feed = stand.service.board.open([submission])
        signals._hear()
        signals._hear()
        assert signals.first.is_set()
        said: list[str] = []
        draining = asyncio.ensure_future(run._drain(stand.service, stand.service.settings, signals, said.append))
        await asyncio.sleep(0.3)
        assert not draining.done() and "a second signal cuts them off" in said[0]
        signals._hear()
        assert await asyncio.wait_for(draining, 2.0) is False
        with pytest.raises(ApiError, match="shut down before"):
            async for _ in feed:
                pass

    asyncio.run(scene())


def test_no_table_grows_however_requests_end(stand: Any) -> None:
    """The texts' side; the pool's is below."""
    params = SamplingParams(max_tokens=4, n=2, stop=["never"])

    async def end_all() -> None:
        board = stand.service.board
        for number in range(8):
            stand.pool.is_held = number > 1
            submissions = [
                Submission(request_id=f"{number}-{i}", prompt=CheckedPrompt("hi", [5]), params=params, is_streamed=True)
                for i in range(2)
            ]
            feed = board.open(submissions)
            if number < 2:  # to the end
                assert [output async for output in feed]
            elif number < 4:
                board.refuse(next(iter(board._owners)), "no", number % 2 > 0)
            elif number < 6:
                stand.pool.step()
                board.end(f"{number}-0", ApiError(503, "ended"))
            feed.close()
        with pytest.raises(ApiError, match="in use"):
            board.open([submissions[0], submissions[0]])

    asyncio.run(end_all())
    assert sizes(stand.service.board) == sizes(stand.service.board._processor) == {}


def test_no_table_of_the_pool_grows_however_requests_end() -> None:
    async def scene(stage: Stage) -> None:
        first, second = stage.engines
        before = sizes(stage.pool) | sizes(stage.pool._balancer)
        for round_number in range(2):
            for name in ("done", "aborted", "finished", "refused", "replayed"):
                stage.submit(f"{name}{round_number}", [1, 2])
            stage.pool.abort(f"aborted{round_number}")
            stage.pool.finish(f"finished{round_number}", FinishReason.STOP)
            for engine in (first, second):
                for engine_id, ticket in list(stage.pool._tickets.items()):
                    if ticket.seat is not None and ticket.seat.peer == engine.launch.peer:
                        if "refused" in engine_id:
                            engine.say(RequestRefused(engine_id, "no"))
                        elif "replayed" not in engine_id:
                            engine.say_tokens(engine_id, 7, end=FinishReason.LENGTH)
            await stage.until(lambda: stage.pool.num_requests == 1)
            ((engine_id, ticket),) = stage.pool._tickets.items()
            dying = first if ticket.seat is stage.pool._seats[0] else second
            dying.die()
            fresh = await stage.next_engine()
            fresh.become_ready()
            first, second = (fresh, second) if dying is first else (first, fresh)
            await stage.until(lambda: all(each.state == "ready" for each in stage.pool.engines))
            second_home = first if ticket.seat is stage.pool._seats[0] else second
            second_home.say_tokens(engine_id, 7, end=FinishReason.LENGTH)
            await stage.until(lambda: stage.pool.num_requests == 0)
        assert len(stage.refusals) == 2 and stage.pool.num_replays == 2
        assert sizes(stage.pool) | sizes(stage.pool._balancer) == before

    play(scene, PoolSettings(max_restarts=100))


def sizes(owner: object) -> dict[str, int]:
    """Of all tables that hold something, by name."""
    tables: Iterable[tuple[str, Any]] = vars(owner).items()
    found = {name: len(value) for name, value in tables if isinstance(value, dict | list | set)}
    return {name: size for name, size in found.items() if size}
