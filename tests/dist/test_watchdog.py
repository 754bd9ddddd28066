"""Ranks that die, stop or stay away, as real processes: everybody ends in time, and the report names the culprit."""

import functools
import json
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from argosy.config import EngineConfig
from argosy.distributed.launcher import Failure, RankProcesses
from argosy.engine.build import prepare
from argosy.engine.deployment import build_spec
from tests.helpers import rank_entries
from tests.helpers.rank_entries import SLOW_S, TIMEOUT_S, await_ready, is_alive, is_port_free, reports, spec, strike

pytestmark = pytest.mark.processes

DEATH_LIMIT_S = 5.0
HANG_LIMIT_S = TIMEOUT_S + 5.0  # as the product's 30 s become 35


def run_and_strike(entry: object, directory: Path, rank: int, blow: signal.Signals) -> tuple[str, float]:
    """The failure's text and how long the end took; nothing may be left of any rank."""
    processes = RankProcesses.start(entry, spec(directory))  # type: ignore[arg-type]
    try:
        await_ready(processes)
        time.sleep(0.3)
        failure, took_s = strike(processes, rank, blow)
    finally:
        processes.close(grace_s=0)
    assert not any(is_alive(pid) for pid in processes.pids.values())
    assert is_port_free(processes.store.address.port)
    assert failure is not None
    assert not failure.is_user_error
    assert failure.ranks == (rank,)
    return failure.text, took_s


@pytest.mark.parametrize("entry", [rank_entries.reduce_for_ever, rank_entries.idle_for_ever])
def test_killed_rank_ends_all_within_five_seconds(entry: object, tmp_path: Path) -> None:
    text, took_s = run_and_strike(entry, tmp_path, 2, signal.SIGKILL)
    assert took_s < DEATH_LIMIT_S
    assert "rank 2 (pid" in text
    assert "killed by SIGKILL" in text
    found = reports(tmp_path)
    assert set(found) == {0, 1, 3}
    assert all("rank 2" in lines[0] for lines in found.values())


def test_rank_stopped_in_a_collective_is_named(tmp_path: Path) -> None:
    text, took_s = run_and_strike(rank_entries.reduce_for_ever, tmp_path, 2, signal.SIGSTOP)
    assert took_s < HANG_LIMIT_S
    assert "rank 2" in text
    found = reports(tmp_path)
    assert set(found) == {0, 1, 3}
    # Rank 3 shares tp with the stopped one and knows the place.
    in_collective = " ".join(found[3])
    assert "in all_reduce #" in in_collective
    assert "on axis tp (layer 3 attention): arrived: rank 3; not arrived: rank 2" in in_collective
    assert "no answer from rank 2" in in_collective


def test_rank_stopped_while_idle_is_named(tmp_path: Path) -> None:
    text, took_s = run_and_strike(rank_entries.idle_for_ever, tmp_path, 1, signal.SIGSTOP)
    assert took_s < HANG_LIMIT_S
    assert "no sign of life from rank 1" in text


class LossInPhase:
    """A start of the engine's ranks that loses rank 2 in a phase, and what came of it."""

    def __init__(self, directory: Path, phase: str, blow: signal.Signals) -> None:
        self.phase, self.directory = phase, directory / phase
        config = EngineConfig(
            tp_size=2,
            dp_size=2,
            device="cpu",
            num_threads=1,
            max_model_len=256,
            collective_timeout_s=TIMEOUT_S,
            flight_recorder_dir=str(self.directory),
        )
        entry = functools.partial(rank_entries.lose_rank_2_in_phase, phase, blow)
        self.processes = RankProcesses.start(entry, build_spec(prepare(config), None))
        self.outcome = Future[tuple[Failure | None, float]]()
        threading.Thread(target=lambda: self.outcome.set_result(self._watch())).start()

    def _watch(self) -> tuple[Failure | None, float]:
        """The failure, and the seconds from the blow until every rank was gone."""
        while self.processes.store.try_get("struck") is None and self.processes.poll() is None:
            time.sleep(0.02)
        started = time.monotonic()
        failure = self.processes.wait(60.0)
        return failure, time.monotonic() - started

    def check(self, limit_s: float) -> None:
        failure, took_s = self.outcome.result()
        assert failure is not None and failure.ranks == (2,), (self.phase, failure)
        assert took_s < limit_s, self.phase
        found = reports(self.directory)
        assert set(found) == {0, 1, 3}, self.phase
        assert all("rank 2" in " ".join(lines) for lines in found.values()), (self.phase, found)
        assert f"this rank was in phase '{self.phase}'" in " ".join(found[0])

    def close(self) -> None:
        port = self.processes.store.address.port
        self.processes.close(grace_s=0)
        assert not any(is_alive(pid) for pid in self.processes.pids.values())
        assert is_port_free(port)


@pytest.mark.parametrize(
    ("blow", "limit_s"), [(signal.SIGKILL, DEATH_LIMIT_S), (signal.SIGSTOP, HANG_LIMIT_S)], ids=["killed", "stopped"]
)
def test_rank_lost_in_a_start_up_phase_is_named(blow: signal.Signals, limit_s: float, tmp_path: Path) -> None:
    """Phases' own deadlines are far off: two minutes, and an hour for the weights. All at once, for most is waiting."""
    phases = ("fingerprints", "groups", "self-test", "weights", "workspace", "cache", "graphs")
    losses = [LossInPhase(tmp_path, phase, blow) for phase in phases]
    try:
        for loss in losses:
            loss.check(limit_s)
    finally:
        for loss in losses:
            loss.close()


def test_slow_rank_has_the_time_of_its_phase(tmp_path: Path) -> None:
    """Its heart beats: what it must not take is a phase's deadline, not a collective's."""
    processes = RankProcesses.start(rank_entries.be_slow_in_a_phase, spec(tmp_path, collective_timeout_s=SLOW_S / 2))
    assert processes.wait(60.0) is None
    assert processes.is_finished
    processes.close()
    assert not list(tmp_path.iterdir())


def test_rank_that_stays_away_from_a_collective_is_named(tmp_path: Path) -> None:
    processes = RankProcesses.start(rank_entries.skip_a_collective, spec(tmp_path))
    failure = processes.wait(60.0)
    processes.close(grace_s=0)
    assert failure is not None
    assert failure.ranks == (3,)
    assert "did not finish within 3 s" in failure.text
    expected = (
        "in all_reduce #4 on axis world (step 3): arrived: ranks 0-2; not arrived: rank 3 (last all_reduce #3 (step 2))"
    )
    assert expected in failure.text
    assert expected in " ".join(reports(tmp_path)[0])
    records = json.loads((tmp_path / "rank-0.json").read_text())["collectives"]
    assert [(record["seq"], record["op"], record["finished"]) for record in records] == [
        (1, "all_reduce", True),
        (2, "all_reduce", True),
        (3, "all_reduce", True),
        (4, "all_reduce", False),
    ]
    assert records[3]["label"] == "step 3"
    assert records[3]["bytes"] == 24


def test_rank_that_stays_away_from_a_replay_is_named_by_all_that_wait(tmp_path: Path) -> None:
    """A graph's collectives are no records of their own: the replay is one of the whole world."""
    processes = RankProcesses.start(rank_entries.skip_a_replay, spec(tmp_path))
    failure = processes.wait(60.0)
    processes.close(grace_s=0)
    assert failure is not None and failure.ranks == (3,)
    label = "decode steps of up to 4 x 64 tokens"
    expected = (
        f"on axis world ({label}): arrived: ranks 0-2; not arrived: rank 3 (last replay #3 ({label}))"
    )
    assert "replay #4" in failure.text and expected in failure.text
    found = reports(tmp_path)
    assert all(expected in " ".join(found[rank]) for rank in (0, 1, 2))
    records = json.loads((tmp_path / "rank-0.json").read_text())["collectives"]
    assert [(record["axis"], record["op"], record["finished"]) for record in records] == [
        ("tp", "all_reduce", True),
        ("world", "all_reduce", True),
        ("world", "replay", True),
        ("world", "replay", True),
        ("world", "replay", False),
    ]


def test_rank_stopped_before_the_ranks_have_met_is_named(tmp_path: Path) -> None:
    processes = RankProcesses.start(rank_entries.idle_for_ever, spec(tmp_path))
    failure, took_s = strike(processes, 2, signal.SIGSTOP)
    processes.close(grace_s=0)
    assert took_s < HANG_LIMIT_S
    assert failure is not None
    assert "rank 2" in failure.text
    assert not any(is_alive(pid) for pid in processes.pids.values())
