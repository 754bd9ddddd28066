"""Requests through the pool: the tokens of an engine alone, each once, whatever is killed or stopped meanwhile.

Engines are real and in processes of their own; the reference is ``LLM`` in this process.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from argosy import LLM, RequestOutput, SamplingParams
from argosy.config import EngineConfig
from argosy.engine.replica_messages import AddRequest
from argosy.messages import FinishReason
from argosy.server.engine_pool import NoEngineError, PoolSettings
from tests.helpers.pool_user import SETTINGS, PoolUser, children_of, processes_of_session

pytestmark = pytest.mark.processes

RESTART_S = 30.0  # the promise is 10 s; other tests may keep the cores busy
LONG = 60  # tokens: long enough to be killed in
TWO_ENGINES = {"dp_size": 2, "ep_size": 1}
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, max_tokens=LONG, ignore_eos=True),
    SamplingParams(
        temperature=0.8,
        top_p=0.9,
        seed=7,
        max_tokens=LONG,
        min_tokens=40,
        stop_token_ids=tuple(range(3, 900)),
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
    ),
)
NUM_REQUESTS = 8


def prompt_of(index: int) -> list[int]:
    return [100 + 37 * index + position for position in range(5 + 3 * index)]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the pools that tests share."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """Request id -> tokens of an undisturbed run."""
    llm = LLM.from_config(EngineConfig(**SETTINGS))  # type: ignore[arg-type]
    prompts = [{"prompt_token_ids": prompt_of(i)} for i in range(NUM_REQUESTS)]
    params = [PARAMS[i % len(PARAMS)] for i in range(NUM_REQUESTS)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(isinstance(output, RequestOutput) for output in outputs)
    return {f"r{i}": output.outputs[0].token_ids for i, output in enumerate(outputs)}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def two_engines(runner: asyncio.Runner) -> Iterator[PoolUser]:
    user = runner.run(PoolUser().start(PoolSettings(stuck_after_s=3.0), **TWO_ENGINES))
    yield user
    runner.run(user.pool.aclose(5.0))
    assert not [pid for pid in user.pids if processes_of_session(pid)]


@pytest.fixture(scope="module")
def one_engine(runner: asyncio.Runner) -> Iterator[PoolUser]:
    user = runner.run(PoolUser().start())
    yield user
    runner.run(user.pool.aclose(5.0))
    assert not [pid for pid in user.pids if processes_of_session(pid)]


def submit_all(user: PoolUser) -> None:
    user.forget()
    for i in range(NUM_REQUESTS):
        user.submit(f"r{i}", prompt_of(i), PARAMS[i % len(PARAMS)])


async def wait_for_tokens(user: PoolUser, number: int) -> None:
    """Of every request that is not over."""
    await user.wait(lambda: all(len(user.tokens[each]) >= number or user.is_over(each) for each in user.tokens))


def check(user: PoolUser, expected: dict[str, list[int]]) -> None:
    assert user.refusals == {}
    assert user.tokens == expected
    assert all(len(reasons) == 1 for reasons in user.ends.values())
    assert user.pool.num_requests == 0


def test_tokens_are_those_of_an_engine_alone(
    runner: asyncio.Runner, two_engines: PoolUser, expected: dict[str, list[int]]
) -> None:
    user = two_engines

    async def run() -> None:
        submit_all(user)
        assert sorted(each.num_requests for each in user.pool.engines) == [NUM_REQUESTS // 2] * 2
        with pytest.raises(ValueError, match="in use"):
            user.pool.submit(AddRequest("r0", [1], PARAMS[0]))
        await user.wait_for_all()

    runner.run(run())
    check(user, expected)
    assert [each.num_requests for each in user.pool.engines] == [0, 0]
    assert user.pool.num_replays == 0


def test_a_killed_engine_costs_no_token_and_comes_back(
    runner: asyncio.Runner, two_engines: PoolUser, expected: dict[str, list[int]]
) -> None:
    user = two_engines

    async def run() -> float:
        await user.wait_until_ready()
        submit_all(user)
        await wait_for_tokens(user, 10)
        os.kill(user.note_pids()[0], signal.SIGKILL)
        noticed_s = await user.wait(lambda: user.pool.engines[0].state == "restarting")
        assert noticed_s < 2.0  # at once; silence alone would take 3 s
        assert user.pool.is_ready and user.pool.engines[0].num_requests == 0
        await user.wait_for_all()
        return await user.wait_until_ready(RESTART_S)

    runner.run(run())
    check(user, expected)
    assert user.pool.num_replays > 0
    assert user.pool.engines[0].num_restarts == 1 and user.pool.engines[1].num_restarts == 0


def test_a_stopped_engine_is_found_and_replaced(
    runner: asyncio.Runner,
    two_engines: PoolUser,
    expected: dict[str, list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    user = two_engines

    async def run() -> None:
        await user.wait_until_ready()
        submit_all(user)
        await wait_for_tokens(user, 10)
        stopped = user.note_pids()[1]
        os.kill(stopped, signal.SIGSTOP)
        seconds = await user.wait(lambda: user.pool.engines[1].state == "restarting")
        assert 2.0 < seconds < 8.0
        await user.wait_for_all()
        await user.wait_until_ready(RESTART_S)
        assert stopped not in user.note_pids() and not processes_of_session(stopped)

    runner.run(run())
    check(user, expected)
    (text,) = [record.getMessage() for record in caplog.records if "is lost" in record.getMessage()]
    assert "engine 1 (pid " in text and "is stopped by a signal" in text  # no progress, or stopped: both at 3 s
    assert "last heard" in text and "requests running" in text


def test_strangers_at_the_socket_change_nothing(
    runner: asyncio.Runner, two_engines: PoolUser, expected: dict[str, list[int]]
) -> None:
    user = two_engines
    name = user.pool._hub.address.endpoint.removeprefix("ipc://@")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)

    async def run() -> None:
        await user.wait_until_ready()
        pids = user.note_pids()
        submit_all(user)
        strangers = []
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 400, greeting, greeting[:20]):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(f"\0{name}")
            stranger.setblocking(False)
            stranger.send(words)
            strangers.append(stranger)
            await asyncio.sleep(0.05)
        await user.wait_for_all()
        for stranger in strangers:
            stranger.close()
        assert user.note_pids() == pids

    runner.run(run())
    check(user, expected)


def test_a_request_that_cannot_be_computed_is_refused(runner: asyncio.Runner, two_engines: PoolUser) -> None:
    user = two_engines

    async def run() -> None:
        await user.wait_until_ready()
        user.forget()
        user.submit("long", [7] * 300, PARAMS[0])
        await user.wait_for_all()
        with pytest.raises(ValueError, match=r"data_parallel_rank \(2\) must be in \[0, dp_size = 2\)"):
            user.pool.submit(AddRequest("x", [1], PARAMS[0]), 2)

    runner.run(run())
    message, is_users_fault = user.refusals["long"]
    assert "the prompt has 300 tokens, but max_model_len is 256" in message and is_users_fault
    assert user.pool.num_requests == 0


def test_an_aborted_request_frees_its_blocks_and_its_id(
    runner: asyncio.Runner, two_engines: PoolUser, expected: dict[str, list[int]]
) -> None:
    user = two_engines

    def used() -> int:
        snapshot = user.pool.engines[1].snapshot
        return -1 if snapshot is None else snapshot.blocks_used

    async def run() -> None:
        await user.wait_until_ready()
        user.forget()
        params = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
        await user.wait(lambda: used() == 0)  # after the test before
        user.submit("r0", [9] * 8, params, 1)
        await user.wait(lambda: used() > 0)
        snapshot = user.pool.engines[1].snapshot
        assert snapshot is not None and snapshot.num_running == 1 and snapshot.has_work
        assert user.pool.engines[0].num_requests == 0
        user.pool.abort("r0")
        num_tokens = len(user.tokens["r0"])
        user.pool.abort("r0")  # twice changes nothing
        user.submit("r0", prompt_of(0), PARAMS[0], 1)  # late news of the first must not reach the second
        user.submit("ended", [3] * 4, params, 1)
        await wait_for_tokens(user, 5)
        user.pool.finish("ended", FinishReason.STOP)
        await user.wait(lambda: user.is_over("r0"))
        await user.wait(lambda: used() == 0, 2.0)
        assert 0 < num_tokens < 240 and user.ends["ended"] == []

    runner.run(run())
    assert user.tokens["r0"] == expected["r0"]
    assert user.pool.num_requests == 0


def test_an_engine_alone_takes_its_requests_up_again(
    runner: asyncio.Runner, one_engine: PoolUser, expected: dict[str, list[int]]
) -> None:
    user = one_engine

    async def run() -> None:
        submit_all(user)
        await wait_for_tokens(user, 10)
        os.kill(user.note_pids()[0], signal.SIGKILL)
        await user.wait(lambda: not user.pool.is_ready)
        with pytest.raises(NoEngineError, match="engine 0 is restarting"):
            user.pool.submit(AddRequest("late", [1], PARAMS[0]))
        user.pool.abort("r1")  # while no engine has it
        del user.tokens["r1"], user.ends["r1"]
        assert user.pool.num_requests == NUM_REQUESTS - 1
        await user.wait_until_ready(RESTART_S)
        await user.wait_for_all()

    runner.run(run())
    check(user, {name: tokens for name, tokens in expected.items() if name != "r1"})


def test_an_engine_killed_while_it_starts_again_is_started_once_more(
    runner: asyncio.Runner, one_engine: PoolUser, expected: dict[str, list[int]]
) -> None:
    user = one_engine

    async def run() -> None:
        await user.wait_until_ready()
        submit_all(user)
        await wait_for_tokens(user, 5)
        (first,) = user.note_pids()
        os.kill(first, signal.SIGKILL)
        await user.wait(lambda: user.pool.engines[0].pid not in (None, first))
        (second,) = user.note_pids()
        await asyncio.sleep(0.3)  # into its imports
        os.kill(second, signal.SIGKILL)
        await user.wait_for_all()
        assert user.pool.engines[0].pid not in (first, second)

    runner.run(run())
    check(user, expected)
    assert user.pool.engines[0].num_restarts == 3  # one of the test before


def test_signals_of_a_terminal_are_the_servers_to_answer(runner: asyncio.Runner, one_engine: PoolUser) -> None:
    async def run() -> None:
        await one_engine.wait_until_ready()
        (pid,) = one_engine.note_pids()
        assert os.getsid(pid) == pid != os.getsid(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        one_engine.forget()
        one_engine.submit("still there", [5, 6], SamplingParams(max_tokens=3, ignore_eos=True))
        await one_engine.wait_for_all()
        assert one_engine.note_pids() == [pid]

    runner.run(run())


def test_requests_are_refused_when_no_engine_is_left() -> None:
    async def run() -> None:
        user = await PoolUser().start(PoolSettings(max_restarts=0))
        try:
            user.submit("lost", [5, 6], PARAMS[0])
            await user.wait(lambda: len(user.tokens["lost"]) > 3)
            (pid,) = user.note_pids()
            os.kill(pid, signal.SIGKILL)
            await user.wait_for_all()
            message, is_users_fault = user.refusals["lost"]
            assert f"engine 0 (pid {pid}) was killed by SIGKILL" in message and not is_users_fault
            assert user.pool.engines[0].state == "failed" and user.pool.num_requests == 0
            with pytest.raises(NoEngineError, match="engine 0 is failed"):
                user.submit("late", [1], PARAMS[0])
        finally:
            await user.pool.aclose(1.0)
        assert not processes_of_session(pid)

    asyncio.run(run())


def test_a_model_that_cannot_work_is_explained_in_the_engines_words() -> None:
    before = children_of(os.getpid())
    with pytest.raises(ValueError) as of_llm:
        LLM("no-such-model")
    with pytest.raises(ValueError) as of_pool:
        asyncio.run(PoolUser().start(model="no-such-model", **TWO_ENGINES))
    assert str(of_pool.value) == str(of_llm.value)
    assert children_of(os.getpid()) <= before


def test_an_engine_killed_while_it_starts_ends_the_start() -> None:
    before = children_of(os.getpid())

    async def run() -> float:
        start = asyncio.ensure_future(PoolUser().start(**TWO_ENGINES))
        while len(children_of(os.getpid()) - before) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # into its imports
        victim = min(children_of(os.getpid()) - before)
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"\(pid {victim}\) was killed by SIGKILL"):
            await start
        return time.monotonic() - killed_s

    assert asyncio.run(run()) < 5.0
    assert children_of(os.getpid()) <= before
