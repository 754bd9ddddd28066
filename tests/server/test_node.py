"""A node other than 0 under ``argosy serve``: when it joins, when it stays, and how it leaves. No engine is started."""

import asyncio
import io
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from argosy.cli.main import main
from argosy.cli.serve import ServeOptions
from argosy.cli.terminal import Terminal
from argosy.config import EngineConfig
from argosy.distributed.startup import Abort, publish_abort, read_abort
from argosy.engine.rejoin import NoRunError, await_run, find_obstacle, is_gone
from argosy.server.node import NodePatience, host_node
from tests.helpers.program import free_port

CONFIG = EngineConfig(dp_size=2, nnodes=2, node_rank=1, master_addr="127.0.0.1", master_port=29_999)
HERE = socket.gethostname()


class PlayedProcess:
    """Ends with ``exit_code``; None: runs until it is told to end, and heeds that only if it is ``polite``."""

    def __init__(self, exit_code: int | None, *, is_polite: bool = True) -> None:
        self.exit_code = exit_code
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.calls: list[str] = []
        self._is_polite = is_polite
        if exit_code is not None:
            self.gone.set_result(None)

    def terminate(self) -> None:
        self.calls.append("terminate")
        if self._is_polite:
            asyncio.get_running_loop().call_later(0.02, self._end, 0)

    def kill(self) -> None:
        self.calls.append("kill")
        self._end(-9)

    def _end(self, exit_code: int) -> None:
        if not self.gone.done():
            self.exit_code = exit_code
            self.gone.set_result(None)


class Stage:
    """Plays the processes of ``exit_codes``, one a run; a SIGTERM arrives in the run that does not end by itself."""

    def __init__(self, *exit_codes: int | None, is_polite: bool = True) -> None:
        self.said: list[str] = []
        self.played: list[PlayedProcess] = []
        self._exit_codes = iter(exit_codes)
        self._is_polite = is_polite

    def start(self, first_words: bytes, name: str) -> PlayedProcess:
        process = PlayedProcess(next(self._exit_codes), is_polite=self._is_polite)
        if process.exit_code is None:
            asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), signal.SIGTERM)
        self.played.append(process)
        return process

    def run(self, **patience: float) -> int:
        settings = {"leave_s": 0.2, "pause_s": 0.001} | patience
        return host_node(CONFIG, NodePatience(**settings), self.said.append, self.start)


@pytest.fixture(autouse=True)
def kept_signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_failed_run_is_followed_by_another_until_node_0_ends_in_good_order() -> None:
    stage = Stage(1, -9, 3, 0)
    assert stage.run() == 0
    assert [line.split(": ", 1)[1] for line in stage.said[1:]] == [
        "the run failed; joins the next one",
        "the run failed; joins the next one",
        "still waits for node 0",
    ]


def test_settings_that_cannot_work_are_not_tried_again() -> None:
    stage = Stage(2)
    assert stage.run() == 2 and len(stage.played) == 1


def test_runs_that_keep_failing_are_given_up_but_waiting_is_not() -> None:
    stage = Stage(*[3] * 20, *[1] * 3)
    assert stage.run(max_failures=2) == 1
    assert "given up, 3 runs failed within 600 s" in stage.said[-1]
    assert len(stage.played) == 23


def test_a_signal_lets_node_0_end_the_engine_first() -> None:
    stage = Stage(None)
    assert stage.run(leave_s=5.0) == 0
    assert stage.played[0].calls[0] == "terminate" and stage.played[0].exit_code == 0


def test_a_node_whose_node_0_goes_on_leaves_in_the_end() -> None:
    stage = Stage(None, is_polite=False)
    assert stage.run() == 1
    assert stage.played[0].calls == ["terminate", "kill"]
    assert "did not end the engine within 0.2 s" in stage.said[-1]


# --- which run may be joined -----------------------------------------------------------------------------------------


class DictStore:
    """The part of ``KeyValueStore`` that is used."""

    def __init__(self, **values: str) -> None:
        self.values = {key.replace("__", "/"): value for key, value in values.items()}

    def try_get(self, key: str) -> str | None:
        return self.values.get(key)

    def set_first(self, key: str, value: str) -> str:
        return self.values.setdefault(key, value)


def test_a_run_in_which_the_place_is_free_may_be_joined() -> None:
    assert find_obstacle(DictStore(claim__node__0="pid 1 on elsewhere"), 1) is None


def test_a_run_that_failed_is_not_joined() -> None:
    store = DictStore()
    publish_abort(store, Abort(text="rank 3 was killed\nmore"))
    assert "the last run failed (rank 3 was killed)" in str(find_obstacle(store, 1))


def test_a_living_process_keeps_its_place() -> None:
    store = DictStore(claim__node__1=f"pid {os.getppid()} on {HERE}")
    assert find_obstacle(store, 1) == f"node 1 is pid {os.getppid()} on {HERE}"
    assert read_abort(store) is None
    assert not is_gone("pid 1 on elsewhere") and not is_gone("nonsense")


def test_the_place_of_a_dead_process_of_this_machine_ends_the_run() -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    store = DictStore(claim__node__1=f"pid {dead} on {HERE}")
    assert find_obstacle(store, 1) is not None
    abort = read_abort(store)
    assert abort is not None and f"node 1 was started again: pid {dead} on {HERE} is gone" in abort.text


def test_an_absent_node_0_is_named_within_the_deadline() -> None:
    config = EngineConfig(
        dp_size=2, nnodes=2, node_rank=1, master_addr="127.0.0.1", master_port=free_port(), startup_timeout_s=0.3
    )
    with pytest.raises(NoRunError, match=rf"127.0.0.1:{config.master_port} could not be reached within"):
        await_run(config)


# --- the command -----------------------------------------------------------------------------------------------------


def test_serve_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    stderr = io.StringIO()
    terminal = Terminal(stdin=io.StringIO(), stdout=io.StringIO(), stderr=stderr)
    assert main(["serve", "--port", "0"], terminal=terminal) == 2
    assert "a server starts its ranks itself" in stderr.getvalue()


def test_a_node_that_is_not_0_waits_as_long_as_a_server_may_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(
        "argosy.server.node.host_node",
        lambda config, patience, say: seen.append((config.node_rank, patience.leave_s)) or 0,
    )
    place = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "1", "--dp", "2"]
    assert main(["serve", *place, "--shutdown-timeout-s", "7"]) == 0
    assert seen == [(1, 17.0)]
    assert ServeOptions().shutdown_timeout_s == 60.0
