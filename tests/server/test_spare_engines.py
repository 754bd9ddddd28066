"""Spare engine processes: started when it is calm, taken for a restart, replaced, passed over when dead or stopped."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from argosy.config import EngineConfig
from argosy.engine.replica_messages import AddRequest
from argosy.sampling_params import SamplingParams
from argosy.server.child_process import is_stopped
from argosy.server.engine_pool import EnginePool
from argosy.server.engine_seat import EngineStatus, PoolSettings
from argosy.server.settings import ServerConfig
from argosy.server.spare_engines import MIN_FREE_BYTES, SpareEngines, free_memory_bytes
from argosy.server.stopped_processes import StoppedProcesses
from tests.helpers.pool_user import SETTINGS, children_of, processes_of_session

WAIT_S = 60.0  # generous: other tests may keep the cores busy
CONFIG = EngineConfig(**SETTINGS)  # type: ignore[arg-type]


def engine(state: str, for_s: float = 100.0) -> EngineStatus:
    return EngineStatus(
        index=0,
        state=state,  # type: ignore[arg-type]
        pid=None,
        num_restarts=0,
        since_s=time.monotonic() - for_s,
        last_message="",
        snapshot=None,
        num_requests=0,
    )


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.01)


def play(scene: Callable[[], Coroutine[object, object, None]]) -> None:
    before = children_of(os.getpid())  # other tests' fork servers
    asyncio.run(scene())
    assert children_of(os.getpid()) <= before


def test_spares_wait_until_all_engines_are_ready_for_a_while() -> None:
    async def scene() -> None:
        spares = SpareEngines(1, CONFIG, calm_s=0.5)
        engines = [engine("ready"), engine("restarting")]
        spares.keep(lambda: engines)
        await asyncio.sleep(1.2)
        assert spares.pids == []
        engines[1] = engine("ready", for_s=-0.3)
        await asyncio.sleep(0.6)
        assert spares.pids == []
        await until(lambda: len(spares.pids) == 1)
        await spares.aclose()

    play(scene)


def test_none_is_started_unless_memory_allows_or_somebody_asks() -> None:
    async def count(number: int | None, free_bytes: int | None) -> int:
        spares = SpareEngines(number, CONFIG, calm_s=0.0, count_free_bytes=lambda: free_bytes)
        spares.keep(lambda: [engine("ready")])
        await asyncio.sleep(1.3)
        num_spares = len(spares.pids)
        await spares.aclose()
        return num_spares

    async def scene() -> None:
        cases = [(None, MIN_FREE_BYTES), (None, MIN_FREE_BYTES - 1), (None, None), (0, 2**50), (2, 0)]
        assert await asyncio.gather(*(count(*case) for case in cases)) == [1, 0, 0, 0, 2]

    play(scene)


def test_free_memory_is_that_of_the_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert free_memory_bytes(tmp_path, tmp_path) == 4096 * 1024
    (tmp_path / "memory.current").write_text("3000000\n")
    for limit, free in (("max", 4096 * 1024), ("3500000", 500000), ("9000000", 4096 * 1024)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert free_memory_bytes(tmp_path, tmp_path) == free
    assert free_memory_bytes(tmp_path / "nothing", tmp_path) is None
    assert free_memory_bytes() is None or free_memory_bytes() > 0  # type: ignore[operator]


@pytest.mark.parametrize("number", [-1, 17, 1.0, True])
def test_a_senseless_number_is_refused(number: object) -> None:
    with pytest.raises(ValueError, match="spare_engines must be an integer in"):
        ServerConfig(spare_engines=number)  # type: ignore[arg-type]


def test_dead_and_stopped_spares_delay_nobody() -> None:
    async def scene() -> None:
        spares = SpareEngines(2, CONFIG, calm_s=0.0)
        spares.keep(lambda: [engine("ready")])
        await until(lambda: len(spares.pids) == 2)
        dead, stopped = spares.pids
        os.kill(dead, signal.SIGKILL)
        await until(lambda: dead not in spares.pids)
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: is_stopped(stopped))
        ends: list[str] = []
        taken = spares.start(b"no launch", "engine 0", ends.append)
        assert taken.pid not in (dead, stopped) and spares.pids == []
        await until(lambda: bool(ends))  # it could not read its first words
        assert ends == [f"engine 0 (pid {taken.pid}) exited with code 1; its output says why"]
        await taken.gone
        await spares.aclose()

    play(scene)


@pytest.mark.processes
@pytest.mark.e2e
def test_a_restart_takes_the_spare_which_is_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)

    async def scene() -> None:
        tokens: list[int] = []
        spares = SpareEngines(1, CONFIG, calm_s=0.0)
        pool = await EnginePool.start(
            CONFIG,
            PoolSettings(),
            deliver=lambda deltas: [tokens.extend(delta.new_token_ids) for delta in deltas],  # type: ignore[arg-type]
            refuse=lambda *refusal: pytest.fail(str(refusal)),
            start_process=spares.start,
        )
        spares.keep(lambda: pool.engines)
        await until(lambda: len(spares.pids) == 1)
        (spare,) = spares.pids
        (first,) = pool.engines
        assert first.pid != spare and first.pid is not None
        for request_id in ("alone", "replayed"):
            start = len(tokens)
            pool.submit(AddRequest(request_id, [50] * 9, params))
            if request_id == "replayed":
                await until(lambda: len(tokens) > 35)
                os.kill(first.pid, signal.SIGKILL)
            await until(lambda start=start: len(tokens) == start + 30)  # type: ignore[misc]
        assert tokens[:30] == tokens[30:]
        (second,) = pool.engines
        assert second.pid == spare and second.num_restarts == 1 and second.state == "ready"
        await until(lambda: len(spares.pids) == 1)
        (other,) = spares.pids
        assert other != spare and processes_of_session(other)
        await pool.aclose(10.0)
        await spares.aclose()
        assert not processes_of_session(spare) and not processes_of_session(other)

    play(scene)
    assert "Traceback" not in capfd.readouterr().err


def test_a_stopped_grandchild_is_found() -> None:
    """As a rank is, below the fork server."""

    async def scene() -> None:
        shell = "sh -c 'sleep 100 & wait' & wait"
        process = await asyncio.create_subprocess_exec("sh", "-c", shell, start_new_session=True)
        await until(lambda: len(processes_of_session(process.pid)) == 3)
        family = processes_of_session(process.pid)
        (last,) = set(family) - set(family.values())
        watch = StoppedProcesses(process.pid)
        assert watch.complain(1.0, 3.0) is None
        os.kill(last, signal.SIGSTOP)
        await until(lambda: is_stopped(last))
        assert watch.complain(2.0, 3.0) is None and watch.complain(5.0, 3.0) is None
        assert watch.complain(5.5, 3.0) == f"process {last} is stopped by a signal for 3.5 s, 3 s are allowed"
        os.kill(last, signal.SIGCONT)
        await until(lambda: not is_stopped(last))
        assert watch.complain(9.0, 3.0) is None
        os.kill(last, signal.SIGSTOP)
        await until(lambda: is_stopped(last))
        assert watch.complain(10.0, 3.0) is None  # counted anew
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    play(scene)
