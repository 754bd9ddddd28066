"""The start as a sequence of named phases that all ranks pass together, each with a deadline.

A rank that fails publishes its error, and all others end with that root cause; a rank that does not come is named. It
decides nothing about what happens in a phase, and knows no torch: ranks talk through the key-value store. Invariant: no
rank leaves a phase before every rank has arrived at its end.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from argosy.distributed.rendezvous import KeyValueStore

ABORT_KEY = "abort"
VERDICT_KEY = "verdict"  # the abort again, once the rank that saw it first knows who had arrived and who had not
RENDEZVOUS = "rendezvous"
LONG_PHASES = ("weights", "workspace", "graphs")  # that have a time of their own
POLL_S = 0.2


class Abort(msgspec.Struct, frozen=True, kw_only=True):
    """Why everything ends: the first who knows writes it, everybody reads it."""

    text: str
    ranks: tuple[int, ...] = ()  # the culprits, where known
    is_user_error: bool = False


class PlaceTakenError(ValueError):
    """This process has no place in the run."""


class PeerFailedError(RuntimeError):
    """Another rank ended the run."""

    def __init__(self, abort: "Abort") -> None:
        super().__init__(abort.text)
        self.abort = abort


@dataclass(frozen=True, slots=True)
class PhaseInProgress:
    """``deadline_s``: seconds of ``time.monotonic`` at which the phase has taken too long, ``limit_s`` its length."""

    name: str
    limit_s: float
    deadline_s: float


def publish_abort(store: KeyValueStore, abort: Abort) -> Abort:
    """The first one counts; returns it."""
    written = store.set_first(ABORT_KEY, msgspec.json.encode(abort).decode())
    return msgspec.json.decode(written, type=Abort)


def publish_verdict(store: KeyValueStore, verdict: Abort) -> None:
    store.set(VERDICT_KEY, msgspec.json.encode(verdict).decode())


def read_root_cause(store: KeyValueStore) -> Abort | None:
    """The verdict if there is one, else the abort."""
    text = store.try_get(VERDICT_KEY)
    return read_abort(store) if text is None else msgspec.json.decode(text, type=Abort)


def read_abort(store: KeyValueStore) -> Abort | None:
    text = store.try_get(ABORT_KEY)
    return None if text is None else msgspec.json.decode(text, type=Abort)


def is_phase_over(store: KeyValueStore, name: str) -> bool:
    """Whether all ranks have passed it."""
    return store.try_get(f"phase/{name}/done") is not None


def claim_place(store: KeyValueStore, kind: str, place: int, num_places: int) -> None:
    """Take the place of a node or a rank. Whoever comes second to a start ends it; a run that has begun is left alone.

    Raises:
        ValueError: another process holds the place, or the nodes disagree on their number.
    """
    own = f"pid {os.getpid()} on {socket.gethostname()}"
    holder = store.set_first(f"claim/{kind}/{place}", own)
    agreed = store.set_first(f"claim/num_{kind}s", str(num_places))
    if holder != own:
        problem = f"two processes claim {kind} {place} of {num_places}: {holder}, and {own}"
    elif agreed != str(num_places):
        problem = f"{kind} {place} ({own}) was started for {num_places} {kind}s, others for {agreed}"
    else:
        return
    problem += "; start each node once, with its own --node-rank and the same --nnodes, --dp-size and --tp-size"
    if not is_phase_over(store, RENDEZVOUS):
        publish_abort(store, Abort(text=problem, is_user_error=True))
    raise PlaceTakenError(problem)


class StartupPhases:
    """One a rank. ``current`` is read by the watchdog, for a body may block where no deadline reaches."""

    def __init__(self, store: KeyValueStore, rank: int, world_size: int, timeout_s: float) -> None:
        self.current: PhaseInProgress | None = None
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s

    @contextlib.contextmanager
    def run(self, name: str, deadline_s: float | None = None) -> Iterator[None]:
        """A phase: the body, then a barrier; together at most ``deadline_s`` (None: the start's timeout).

        Raises:
            PeerFailedError: another rank failed.
            RuntimeError: some ranks did not arrive in time.
        """
        limit_s = self._timeout_s if deadline_s is None else deadline_s
        self.current = PhaseInProgress(name, limit_s, time.monotonic() + limit_s)
        self._store.set(f"at/{self._rank}", f"in phase {name!r}")
        yield
        self._meet(f"phase/{name}", self.current)
        self._store.set(f"at/{self._rank}", f"after phase {name!r}")
        self.current = None

    def compare_fingerprints(self, fingerprints: Mapping[str, str]) -> None:
        """What must be equal on all ranks: sizes, settings, hashes. Collective, within a phase.

        Raises:
            ValueError: names the field, its values and their ranks.
        """
        texts = self.gather("fingerprints", msgspec.json.encode(dict(fingerprints)).decode())
        by_rank = [msgspec.json.decode(text, type=dict[str, str]) for text in texts]
        for name in sorted(set().union(*by_rank)):
            ranks_of: dict[str, list[int]] = {}
            for rank, values in enumerate(by_rank):
                ranks_of.setdefault(values.get(name, "absent"), []).append(rank)
            if len(ranks_of) > 1:
                found = ", ".join(f"{value!r} on {name_ranks(ranks)}" for value, ranks in ranks_of.items())
                raise ValueError(
                    f"{name} must be equal on all ranks, got {found}; start every node with the same flags, "
                    "checkpoint and version"
                )

    def gather(self, name: str, value: str) -> list[str]:
        """Every rank's text, in rank order. Collective, within a phase; a name is used once."""
        phase = self.current
        assert phase is not None, "gather is for the body of a phase"
        self._store.set(f"gather/{name}/{self._rank}", value)
        self._meet(f"gather/{name}", phase)
        found = self._store.get_all([f"gather/{name}/{rank}" for rank in range(self._world_size)])
        return [text or "" for text in found]

    def _meet(self, key: str, phase: PhaseInProgress) -> None:
        """A barrier that gives up for a failed rank, or at the deadline."""
        self._store.set(f"{key}/here/{self._rank}", "1")
        if self._store.add(f"{key}/count", 1) == self._world_size:
            self._store.set(f"{key}/done", "1")
        while not self._store.wait_for(f"{key}/done", POLL_S):
            abort = read_abort(self._store)
            if abort is not None:
                raise PeerFailedError(abort)
            if time.monotonic() > phase.deadline_s:
                raise PhaseTimeoutError(self._explain_missing(key, phase), self._missing(key))

    def _missing(self, key: str) -> tuple[int, ...]:
        here = self._store.get_all([f"{key}/here/{rank}" for rank in range(self._world_size)])
        return tuple(rank for rank, mark in enumerate(here) if mark is None)

    def _explain_missing(self, key: str, phase: PhaseInProgress) -> str:
        missing = self._missing(key)
        whereabouts = locate_ranks(self._store, missing)
        return (
            f"phase {phase.name!r}: {name_ranks(missing)} of {self._world_size} did not arrive within "
            f"{phase.limit_s:g} s ({whereabouts}); start the missing nodes, or raise "
            f"{'--weights-timeout-s' if phase.name in LONG_PHASES else '--startup-timeout-s'} if they are only slow"
        )


class PhaseTimeoutError(RuntimeError):
    """Ranks did not come to the end of a phase in time."""

    def __init__(self, text: str, missing: tuple[int, ...]) -> None:
        super().__init__(text)
        self.missing = missing


def locate_ranks(store: KeyValueStore, ranks: Sequence[int]) -> str:
    """For people: ``ranks 8-15 never connected, rank 3 was last in phase 'weights'``."""
    places: dict[str, list[int]] = {}
    for rank, phase in zip(ranks, store.get_all([f"at/{rank}" for rank in ranks]) if ranks else [], strict=True):
        place = "never connected" if phase is None else f"last seen {phase}"
        places.setdefault(place, []).append(rank)
    return ", ".join(f"{name_ranks(members)} {place}" for place, members in places.items())


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-7, 9``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(parts) or 'none'}"
