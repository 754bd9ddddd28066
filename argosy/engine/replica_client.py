"""The driver's side of an engine whose replicas run in other processes: who computes what, who sleeps, who is done.

Sockets and processes are behind ``ReplicaLink``. A request is the driver's until its last tokens are reported here, or
until the driver itself ends it; what leaders say of it later is ignored. Invariant: leaders that sleep while a request
is unfinished are woken by the next ``step``, once all of them have said that they sleep: before that, one of them may
still be in a step, and waking the others would let them wait for it in vain.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from argosy.engine.dp_load_balancer import DPLoadBalancer
from argosy.engine.replica_loop import build_request
from argosy.engine.replica_messages import (
    AbortRequest,
    AddRequest,
    CollectStats,
    Command,
    FinishRequest,
    Idle,
    ReplicaReady,
    ReplicaStats,
    Report,
    Shutdown,
    StepDeltas,
    UpdateSettings,
    Wake,
)
from argosy.engine.request import check_fits_cache
from argosy.engine.wire import AnySpoke
from argosy.messages import FinishReason, TokenDelta

ORDERLY_END_S = 2.0  # how long leaders may take to fall asleep before they are ended anyway
_RECEIVE_S = 1.0  # an upper bound only: news ends the wait at once


class ReplicaLink(Protocol):
    """The way to all leaders. Messages to one leader, and from one leader, keep their order."""

    @property
    def num_replicas(self) -> int: ...

    def send(self, dp_rank: int, command: Command) -> None: ...

    def receive(self, timeout_s: float, interrupt: AnySpoke | None = None) -> list[tuple[int, Report]]:
        """What has arrived, by dp rank; waits for something until the timeout, or until ``interrupt`` has something.

        Raises:
            RuntimeError: a rank has failed; all processes are gone by then.
        """

    def close(self, *, is_orderly: bool) -> None:
        """End all processes; orderly: they have been told to end, so give them a moment."""


class ReplicasClient:
    """``EngineClient`` over the leaders of all replicas, each of which has reported that it is ready.

    ``max_model_len``, ``block_size`` and ``num_blocks`` are those of every replica: requests are checked here.
    """

    def __init__(self, link: ReplicaLink, *, max_model_len: int, block_size: int, num_blocks: int) -> None:
        self._link = link
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._num_usable_blocks = num_blocks - 1
        self._balancer = DPLoadBalancer(link.num_replicas)
        self._sleeps_before: list[int | None] = [0] * link.num_replicas  # by dp rank; None: awake
        self._deltas: list[TokenDelta] = []  # arrived while something else was waited for
        self._stats: dict[int, ReplicaStats] = {}
        self._asked_for_stats: set[int] = set()  # leaders whose answer is on its way
        self._is_open = True
        self.largest_imbalance = 1.0  # of the tokens in flight, seen at any step

    @property
    def load_balancer(self) -> DPLoadBalancer:
        return self._balancer

    @property
    def are_all_asleep(self) -> bool:
        return None not in self._sleeps_before

    def add(self, request: AddRequest, data_parallel_rank: int | None = None) -> None:
        self._check_open()
        # The leader will not refuse it: what it would check is checked here.
        checked = build_request(request, ())
        checked.limit_length(self._max_model_len)
        check_fits_cache(checked, self._block_size, self._num_usable_blocks)
        dp_rank = self._balancer.add(request.request_id, checked.num_tokens, data_parallel_rank)
        self._link.send(dp_rank, request)

    def abort(self, request_id: str) -> None:
        dp_rank = self._balancer.remove(request_id)
        if dp_rank is not None and self._is_open:
            self._link.send(dp_rank, AbortRequest(request_id))

    def finish(self, request_id: str, reason: FinishReason) -> None:
        dp_rank = self._balancer.remove(request_id)
        if dp_rank is not None and self._is_open:
            self._link.send(dp_rank, FinishRequest(request_id, reason))

    def step(self, interrupt: AnySpoke | None = None, timeout_s: float = 0.0) -> list[TokenDelta]:
        self._check_open()
        self.largest_imbalance = max(self.largest_imbalance, self._balancer.imbalance)
        if interrupt is not None and not self._deltas:
            if self._balancer.num_requests:
                self._wake_sleepers()
            self._pump(timeout_s, interrupt)
        while interrupt is None and self._balancer.num_requests and not self._deltas:
            self._wake_sleepers()
            self._pump()
        deltas, self._deltas = self._deltas, []
        return deltas

    def has_unfinished(self) -> bool:
        return bool(self._balancer.num_requests or self._deltas)

    def update_settings(self, settings: UpdateSettings) -> None:
        self._check_open()
        if self.has_unfinished():
            raise RuntimeError(
                f"settings change between requests only, and {self._balancer.num_requests} are unfinished"
            )
        self._pump_until(lambda: self.are_all_asleep)
        for dp_rank in range(self._link.num_replicas):
            self._link.send(dp_rank, settings)

    def collect_stats(self) -> list[ReplicaStats]:
        self._check_open()
        if not self.has_unfinished():
            self._pump_until(lambda: self.are_all_asleep)  # so that all replicas have counted the same steps
        self._pump_until(lambda: not self._asked_for_stats)
        self._stats = {}
        for dp_rank in range(self._link.num_replicas):
            self._link.send(dp_rank, CollectStats())
        self._pump_until(lambda: len(self._stats) == self._link.num_replicas)
        return [self._stats[dp_rank] for dp_rank in range(self._link.num_replicas)]

    def poll_stats(self, *, has_ranks: bool) -> list[ReplicaStats]:
        self._check_open()
        dp_ranks = range(self._link.num_replicas)
        for dp_rank in dp_ranks:
            if dp_rank not in self._asked_for_stats:  # a leader in a long step is asked once
                self._link.send(dp_rank, CollectStats(has_ranks))
                self._asked_for_stats.add(dp_rank)
        return [self._stats[dp_rank] for dp_rank in dp_ranks] if len(self._stats) == len(dp_ranks) else []

    def close(self) -> None:
        """Aborts what is unfinished. Leaders that fall asleep in time are told to end; the others are ended."""
        if not self._is_open:
            return
        is_orderly = False
        try:
            with contextlib.suppress(RuntimeError):  # a rank failed, and so all have been ended
                for request_id in self._balancer.request_ids:
                    self.abort(request_id)
                is_orderly = self._fall_asleep_in_time()
                for dp_rank in range(self._link.num_replicas if is_orderly else 0):
                    self._link.send(dp_rank, Shutdown())
        finally:
            if self._is_open:  # else a failure has ended everything on the way
                self._is_open = False
                self._link.close(is_orderly=is_orderly)

    def _fall_asleep_in_time(self) -> bool:
        """Whether all leaders sleep; with nothing left to do they fall asleep after the step they are in."""
        deadline_s = time.monotonic() + ORDERLY_END_S
        while not self.are_all_asleep and (left_s := deadline_s - time.monotonic()) > 0:
            self._pump(left_s)
        return self.are_all_asleep

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("the engine is closed; build a new LLM")

    def _wake_sleepers(self) -> None:
        steps = {step for step in self._sleeps_before if step is not None}
        if None in self._sleeps_before:
            return
        assert len(steps) == 1, f"leaders sleep before different steps: {self._sleeps_before}"
        for dp_rank in range(self._link.num_replicas):
            self._link.send(dp_rank, Wake(*steps))
        self._sleeps_before = [None] * self._link.num_replicas

    def _pump_until(self, is_done: Callable[[], bool]) -> None:
        """Bounded by the link: it raises when a rank fails, and a rank that hangs is a rank that fails."""
        while not is_done():
            self._pump()

    def _pump(self, timeout_s: float = _RECEIVE_S, interrupt: AnySpoke | None = None) -> None:
        try:
            reports = self._link.receive(timeout_s, interrupt)
        except RuntimeError:
            self._is_open = False  # all processes are gone
            self._link.close(is_orderly=False)
            raise
        for dp_rank, report in reports:
            self._take(dp_rank, report)

    def _take(self, dp_rank: int, report: Report) -> None:
        match report:
            case StepDeltas(deltas):
                for delta in deltas:
                    self._take_delta(delta)
            case Idle(step):
                self._sleeps_before[dp_rank] = step
            case ReplicaStats():
                self._stats[dp_rank] = report
                self._asked_for_stats.discard(dp_rank)
            case ReplicaReady():
                raise RuntimeError(f"replica {dp_rank} started again; its requests are lost, restart the engine")

    def _take_delta(self, delta: TokenDelta) -> None:
        if not self._balancer.holds(delta.request_id):
            return  # aborted or finished here
        self._deltas.append(delta)
        if delta.finish_reason is None:
            self._balancer.grow(delta.request_id, len(delta.new_token_ids))
        else:
            self._balancer.remove(delta.request_id)
