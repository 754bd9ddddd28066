"""The step loop's body for an engine of one rank in this process: schedule -> start -> finish -> update.

One rank agrees with itself and exchanges nothing. Replicas in other processes have ``replica_loop.py``. Who calls
``step`` and when is the caller's business. Invariant: after a step that raised, and once no request is left, nothing is
in flight and no request holds blocks or rows.
"""

import os
import time
from collections import deque

from argosy.engine.replica_loop import count_replica
from argosy.engine.replica_messages import RankStats, ReplicaStats, UpdateSettings
from argosy.engine.request import Request
from argosy.engine.scheduler import Scheduler
from argosy.engine.step_times import StepTimes
from argosy.messages import FinishReason, ScheduledBatch, TokenDelta
from argosy.runner.model_runner import ModelRunner, StepInFlight


class EngineCore:
    """Scheduler and runner."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.is_eager = False  # nothing is replayed, even if it was recorded
        self.times = StepTimes()
        self._in_flight: deque[tuple[ScheduledBatch, StepInFlight]] = deque()  # oldest first

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run in this cache.
        """
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request now; False if it is unknown or over."""
        is_ended = self.scheduler.abort(request_id)
        self._forget_steps_of_nobody()
        return is_ended

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """End a request whose end was found in its text; the caller has reported it, so no delta follows."""
        is_ended = self.scheduler.finish_request(request_id, reason)
        self._forget_steps_of_nobody()
        return is_ended

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def step(self) -> list[TokenDelta]:
        """Start as many steps as may be in flight, then finish the oldest: the new tokens of every request in it."""
        scheduler, in_flight = self.scheduler, self._in_flight
        started_s = time.monotonic()
        try:
            while len(in_flight) < scheduler.max_steps_in_flight:
                batch = scheduler.schedule()
                if batch.is_empty:
                    break
                recording = None if self.is_eager else self.runner.choose_recording(batch)
                in_flight.append((batch, self.runner.start(batch, recording=recording)))
            if not in_flight:
                return scheduler.drain()
            batch, oldest = in_flight[0]
            output = self.runner.finish(oldest)
            in_flight.popleft()
            deltas = scheduler.update(batch, output)
        except BaseException:
            self._forget_steps()
            raise
        self._forget_steps_of_nobody()
        self.times.add(time.monotonic() - started_s, batch.num_tokens)
        return deltas

    def update_settings(self, settings: UpdateSettings) -> None:
        """The exchange's settings change nothing here. Raises RuntimeError while requests are unfinished."""
        if self.has_unfinished():
            raise RuntimeError("settings change between requests only, and some are unfinished")
        if settings.max_num_batched_tokens is not None:
            self.scheduler.max_num_batched_tokens = settings.max_num_batched_tokens
        if settings.async_scheduling is not None:
            self.scheduler.async_scheduling = settings.async_scheduling
        if settings.enforce_eager is not None:
            self.is_eager = settings.enforce_eager

    def collect_stats(self, *, has_ranks: bool = True) -> ReplicaStats:
        """NOTE(sync): ``has_ranks`` reads the experts' counters from the device."""
        return count_replica(self.scheduler, times=self.times, ranks=[self._count_rank()] if has_ranks else [])

    def _count_rank(self) -> RankStats:
        runner = self.runner
        return RankStats(
            rank=0,
            pid=os.getpid(),
            bytes_sent={},
            tokens_per_expert=runner.model.expert_load.local_counts(),
            num_replays=runner.num_replays,
            num_late_compilations=runner.compilations.num_compilations,
        )

    def _forget_steps_of_nobody(self) -> None:
        """When the last request has ended, a step in flight has nothing to tell, so nobody waits for it.

        Later steps may use its blocks and rows at once: the device does what it was given in order.
        """
        if not (self.scheduler.num_running or self.scheduler.num_waiting):
            self._forget_steps()

    def _forget_steps(self) -> None:
        """Nothing that was finished is lost: its tokens are with their requests."""
        self._in_flight.clear()
        self.scheduler.cancel_steps()
