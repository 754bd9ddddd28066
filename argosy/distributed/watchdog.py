"""The watchdog of one rank: a thread that ends the process when the ranks cannot go on together.

It ends it for a collective or a phase that takes too long, a collective that raised, a peer without a sign of life, an
error that another rank or launcher published, or a lost store. Before that, every survivor tells the others how far it
is, and reports what was in flight, who had arrived and who had not. Invariant: after a failure anywhere, this process
is gone within the collective timeout plus ``LAST_WORDS_S`` and a tick, whatever its main thread is stuck in.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from argosy.distributed.flight_recorder import CollectiveRecord, FlightRecorder, describe
from argosy.distributed.rendezvous import KeyValueStore, StoreLostError
from argosy.distributed.startup import (
    Abort,
    StartupPhases,
    locate_ranks,
    name_ranks,
    publish_abort,
    publish_verdict,
    read_abort,
)

TICK_S = 0.5
LAST_WORDS_S = 2.0  # how long survivors wait for each other's progress
ROOT_CAUSE_S = 1.0  # how long one that lost a connection waits for somebody who knows why
PHASE_MARGIN_S = 2.0  # past a phase's deadline; a rank at the barrier knows better who is missing, and speaks first
SURVIVOR_EXIT_CODE = 70  # ended because of another rank
FAILURE_EXIT_CODE = 1
ENDED = "ended"  # instead of a heartbeat: this rank left on purpose


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a rank is on one axis: its last collective, and whether it is still in it."""

    seq: int
    op: str
    label: str
    is_open: bool


class Watchdog:
    """``exit_process`` is for tests; a watchdog that fires does not return."""

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        world_size: int,
        *,
        recorder: FlightRecorder,
        phases: StartupPhases,
        timeout_s: float,
        dump_directory: Path,
        exit_process: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._recorder = recorder
        self._phases = phases
        self._timeout_s = timeout_s
        self._dump_directory = dump_directory
        self._exit_process = exit_process
        self._beats = 0
        self._seen: dict[int, tuple[str | None, float]] = {}  # rank -> last heartbeat, and when it was new
        self._stopping = threading.Event()
        self._failing = threading.Lock()  # never released: the first failure ends the process
        self._thread = threading.Thread(target=self._watch, name="argosy-watchdog", daemon=True)

    def start(self) -> None:
        """All ranks have connected: from now on each must show signs of life."""
        self._recorder.on_failure = self
        self._thread.start()

    def stop(self) -> None:
        """This rank is done, and others need not worry about it."""
        self._stopping.set()
        self._thread.join()
        self._store.set(f"beat/{self._rank}", ENDED)

    def peer_failed(self, abort: Abort) -> NoReturn:
        """The main thread found out before the watching one."""
        self._follow(abort, None)

    def collective_failed(self, record: CollectiveRecord, error: Exception) -> NoReturn:
        """A collective raised on the main thread. A lost connection is an effect: wait for who knows the cause."""
        deadline = time.monotonic() + ROOT_CAUSE_S
        try:
            while time.monotonic() < deadline:
                abort = read_abort(self._store)
                if abort is not None:
                    self._follow(abort, record)
                time.sleep(0.05)
        except StoreLostError as lost:
            self._end_alone(lost)
        message = str(error).splitlines()[0]
        self._fail(Abort(text=f"rank {self._rank}: {describe(record)} failed: {message}"), record)

    def _watch(self) -> None:
        while not self._stopping.wait(min(TICK_S, self._timeout_s / 4)):
            try:
                self._tick()
            except StoreLostError as error:
                if not self._stopping.is_set():
                    self._end_alone(error)

    def _tick(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))
        abort = read_abort(self._store)
        if abort is not None:
            self._follow(abort, next(iter(self._recorder.open_records()), None))
        self._check_collectives()
        self._check_phase()
        self._check_peers()

    def _check_collectives(self) -> None:
        now = time.monotonic()
        for record in self._recorder.open_records():
            if now - record.started_s > self._timeout_s:
                text = f"{describe(record)} did not finish within {self._timeout_s:g} s"
                self._fail(Abort(text=text), record)

    def _check_phase(self) -> None:
        phase = self._phases.current
        if phase is not None and time.monotonic() > phase.deadline_s + PHASE_MARGIN_S:
            places = locate_ranks(self._store, range(self._world_size))
            text = f"phase {phase.name!r} did not end on rank {self._rank} within {phase.limit_s:g} s ({places})"
            self._fail(Abort(text=text, ranks=(self._rank,)), None)

    def _check_peers(self) -> None:
        now = time.monotonic()
        beats = self._store.get_all([f"beat/{rank}" for rank in range(self._world_size)])
        for rank, beat in enumerate(beats):
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
        silent = [
            rank
            for rank, (beat, since_s) in self._seen.items()
            if rank != self._rank and beat != ENDED and now - since_s > self._timeout_s
        ]
        if silent:
            text = f"no sign of life from {name_ranks(silent)} for {self._timeout_s:g} s (stopped, or cut off)"
            self._fail(Abort(text=text, ranks=tuple(silent)), None)

    def _fail(self, abort: Abort, record: CollectiveRecord | None) -> NoReturn:
        """This rank saw it. ``record``: the collective it is stuck in."""
        self._end(abort, record, is_first=True)

    def _follow(self, abort: Abort, record: CollectiveRecord | None) -> NoReturn:
        """Somebody else saw it, and published it."""
        self._end(abort, record, is_first=False)

    def _end(self, abort: Abort, record: CollectiveRecord | None, *, is_first: bool) -> NoReturn:
        """Publish, collect, report, exit."""
        self._failing.acquire()
        lines: list[str] = [abort.text]
        try:
            known = publish_abort(self._store, abort) if is_first else abort
            progress = self._exchange_progress(known)
            lines = self._explain(known, record, progress)
            if is_first and known == abort:  # what was seen first is worth explaining: now it is known who was missing
                culprits = known.ranks or find_absent(record, progress, self._world_size)
                publish_verdict(self._store, Abort(text="\n".join(lines), ranks=culprits))
        except StoreLostError as error:
            lines.append(str(error))
        finally:
            self._say((*lines, self._write_dump(lines)))
            self._exit_process(SURVIVOR_EXIT_CODE)

    def _end_alone(self, error: StoreLostError) -> NoReturn:
        """Nobody can be told or asked. If this node's launching process is gone too, this one is killed in the wait,
        without a word: who ended the launcher knows."""
        self._failing.acquire()
        time.sleep(ROOT_CAUSE_S)
        self._say((f"{error} ({self._write_dump([str(error)])})",))
        self._exit_process(SURVIVOR_EXIT_CODE)

    def _exchange_progress(self, abort: Abort) -> dict[int, dict[str, Progress]]:
        """Of every rank that answers in time."""
        own = {
            axis: Progress(seq=at.seq, op=at.op, label=at.label, is_open=at.is_open)
            for axis, at in self._recorder.progress().items()
        }
        self._store.set(f"progress/{self._rank}", msgspec.json.encode(own).decode())
        deadline = time.monotonic() + LAST_WORDS_S
        expected = [rank for rank in range(self._world_size) if rank not in abort.ranks or rank == self._rank]
        while True:
            answers = self._store.get_all([f"progress/{rank}" for rank in range(self._world_size)])
            if all(answers[rank] is not None for rank in expected) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return {
            rank: msgspec.json.decode(answer, type=dict[str, Progress])
            for rank, answer in enumerate(answers)
            if answer is not None
        }

    def _explain(
        self, abort: Abort, record: CollectiveRecord | None, progress: dict[int, dict[str, Progress]]
    ) -> list[str]:
        lines = [abort.text]
        if record is not None:
            lines.append(explain_collective(record, progress))
        phase = self._phases.current
        if phase is not None:
            lines.append(f"this rank was in phase {phase.name!r}")
        silent = [rank for rank in range(self._world_size) if rank not in progress]
        if silent:
            lines.append(f"no answer from {name_ranks(silent)}")
        return lines

    def _write_dump(self, lines: Sequence[str]) -> str:
        """Where it is, for people."""
        path = self._dump_directory / f"rank-{self._rank}.json"
        try:
            self._recorder.write_json(path, lines)
        except OSError as error:
            return f"the flight recorder could not be written: {error}"
        return f"flight recorder: {path}"

    def _say(self, lines: Sequence[str]) -> None:
        # One write: sixteen ranks share the terminal.
        sys.stderr.write("".join(f"argosy rank {self._rank}: {line}\n" for line in lines))
        sys.stderr.flush()


def find_absent(
    record: CollectiveRecord | None, progress: dict[int, dict[str, Progress]], world_size: int
) -> tuple[int, ...]:
    """Who to blame for a hang: ranks that do not answer, else those that did not come to the collective."""
    silent = tuple(rank for rank in range(world_size) if rank not in progress)
    if silent or record is None:
        return silent
    return tuple(rank for rank in record.ranks if not _has_arrived(rank, record, progress))


def explain_collective(record: CollectiveRecord, progress: dict[int, dict[str, Progress]]) -> str:
    """Who had come to the collective ``record`` and who had not, by global rank."""
    arrived = [rank for rank in record.ranks if _has_arrived(rank, record, progress)]
    behind = [
        f"rank {rank} ({_explain_place(rank, record.axis, progress)})" for rank in record.ranks if rank not in arrived
    ]
    missing = f"; not arrived: {', '.join(behind)}" if behind else ""
    return f"in {describe(record)}: arrived: {name_ranks(arrived)}{missing}"


def _has_arrived(rank: int, record: CollectiveRecord, progress: dict[int, dict[str, Progress]]) -> bool:
    at = progress.get(rank, {}).get(record.axis)
    return at is not None and at.seq >= record.seq


def _explain_place(rank: int, axis: str, progress: dict[int, dict[str, Progress]]) -> str:
    if rank not in progress:
        return "no answer"
    at = progress[rank].get(axis)
    if at is None:
        return "nothing yet on this axis"
    return f"last {at.op} #{at.seq}{f' ({at.label})' if at.label else ''}"
