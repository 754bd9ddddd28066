"""The last collectives of this rank, in memory: what ran, how far it came, and what never came back.

Every collective of every Communicator is one ``CollectiveRecord``; the watchdog reads the open ones, and a failure
writes all of them as JSON. Collectives that a device graph keeps are on a ``CollectiveTape`` instead: they run at every
replay, which is one record. It starts nothing, watches nothing, and knows no torch. Invariant: on one axis the sequence
numbers of all ranks count the same collectives, so two ranks' numbers can be compared.
"""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

DEFAULT_CAPACITY = 512  # collectives; some four steps of a 61-layer model


class Completion(Protocol):
    """What a record asks a collective in flight; torch's ``Work`` answers."""

    def is_completed(self) -> bool: ...


@dataclass(slots=True, eq=False)
class CollectiveRecord:
    """One collective, seen by one rank. Times are seconds of ``time.monotonic``."""

    axis: str
    ranks: tuple[int, ...]
    seq: int
    op: str
    label: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int  # this rank sends to other ranks
    started_s: float
    finished_s: float | None = None
    work: Completion | None = None  # set while the collective is in flight
    error: str = ""

    def finish(self) -> None:
        self.finished_s = time.monotonic()
        self.work = None

    def is_open(self) -> bool:
        """Not finished. Asks the collective itself: on a card it ends without anybody waiting for it."""
        if not self.error and self.finished_s is None and self.work is not None and self.work.is_completed():
            self.finish()
        return self.finished_s is None


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisProgress:
    """How far a rank is on one axis: its last collective, and whether it is still in it."""

    ranks: tuple[int, ...]
    seq: int
    op: str
    label: str
    is_open: bool


class FailureHandler(Protocol):
    """Who is told of a collective that raised. It does not return: the group cannot be used any more."""

    def collective_failed(self, record: CollectiveRecord, error: Exception) -> NoReturn: ...


class RaiseFailure:
    """Without a watchdog (tests, tools) the caller gets the error."""

    def collective_failed(self, record: CollectiveRecord, error: Exception) -> NoReturn:
        raise RuntimeError(f"{describe(record)} failed: {error}") from error


def describe(record: CollectiveRecord | AxisProgress, axis: str = "") -> str:
    """For people: ``all_reduce #118 on axis tp (layer 3 attention)``."""
    name = record.axis if isinstance(record, CollectiveRecord) else axis
    where = f" ({record.label})" if record.label else ""
    return f"{record.op} #{record.seq} on axis {name}{where}"


class CollectiveTape:
    """What the collectives of one recording send. Nothing was sent when it was recorded."""

    def __init__(self) -> None:
        self.num_collectives = 0
        self.num_bytes = 0
        self._sent: list[tuple[dict[str, int], str, int]] = []  # a communicator's counters, operation, bytes

    def add(self, counters: dict[str, int], op: str, num_bytes: int) -> None:
        self.num_collectives += 1
        self.num_bytes += num_bytes
        for i, (known, known_op, so_far) in enumerate(self._sent):
            if known is counters and known_op == op:
                self._sent[i] = counters, op, so_far + num_bytes
                return
        self._sent.append((counters, op, num_bytes))

    def count_replay(self) -> None:
        """Once more, all of them."""
        for counters, op, num_bytes in self._sent:
            counters[op] = counters.get(op, 0) + num_bytes


class FlightRecorder:
    """A ring of records. One a rank; its Communicators write, its watchdog reads."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY, on_failure: FailureHandler | None = None) -> None:
        self.on_failure: FailureHandler = on_failure or RaiseFailure()
        self._records: deque[CollectiveRecord] = deque(maxlen=capacity)
        self._last: dict[str, CollectiveRecord] = {}
        self.tape: CollectiveTape | None = None  # where collectives go that are being recorded, or run in a replay
        self._lock = threading.Lock()  # appending while another thread iterates a deque raises

    def start(
        self,
        axis: str,
        ranks: tuple[int, ...],
        op: str,
        label: str,
        shape: Sequence[int],
        dtype: str,
        num_bytes: int,
    ) -> CollectiveRecord:
        if self.tape is not None:  # no record of its own, but a name if it fails
            seq = self.tape.num_collectives
            return CollectiveRecord(axis, ranks, seq, op, label, tuple(shape), dtype, num_bytes, time.monotonic())
        last = self._last.get(axis)
        seq = last.seq + 1 if last else 1
        record = CollectiveRecord(axis, ranks, seq, op, label, tuple(shape), dtype, num_bytes, time.monotonic())
        with self._lock:
            self._records.append(record)
            self._last[axis] = record
        return record

    @contextlib.contextmanager
    def taping(self) -> Iterator[CollectiveTape]:
        """Collectives that are started meanwhile go on the tape: they are neither watched nor counted."""
        assert self.tape is None, "a recording within a recording"
        self.tape = CollectiveTape()
        try:
            yield self.tape
        finally:
            self.tape = None

    def fail(self, record: CollectiveRecord, error: Exception) -> NoReturn:
        """A collective raised: the handler raises in turn, or reports and ends the process."""
        record.error = str(error)
        self.on_failure.collective_failed(record, error)

    def open_records(self) -> list[CollectiveRecord]:
        """Oldest first."""
        return [record for record in self._snapshot() if record.is_open()]

    def progress(self) -> dict[str, AxisProgress]:
        with self._lock:
            last = dict(self._last)
        return {
            axis: AxisProgress(
                ranks=record.ranks, seq=record.seq, op=record.op, label=record.label, is_open=record.is_open()
            )
            for axis, record in last.items()
        }

    def write_json(self, path: Path, report: Sequence[str] = ()) -> None:
        """The report's lines, and every record, oldest first; ``age_s`` counts back from now."""
        now = time.monotonic()
        records = [_to_json(record, now) for record in self._snapshot()]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"written_at": time.time(), "report": list(report), "collectives": records}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _snapshot(self) -> list[CollectiveRecord]:
        with self._lock:
            return list(self._records)


def _to_json(record: CollectiveRecord, now: float) -> dict[str, object]:
    took_s = None if record.finished_s is None else round(record.finished_s - record.started_s, 6)
    return {
        "axis": record.axis,
        "ranks": list(record.ranks),
        "seq": record.seq,
        "op": record.op,
        "label": record.label,
        "shape": list(record.shape),
        "dtype": record.dtype,
        "bytes": record.num_bytes,
        "age_s": round(now - record.started_s, 6),
        "took_s": took_s,
        "finished": record.finished_s is not None,
        "error": record.error,
    }
