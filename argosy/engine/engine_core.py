"""The step loop's body for an engine of one rank in this process: schedule -> execute -> update.

One rank agrees with itself and exchanges nothing. Replicas in other processes have ``replica_loop.py``. Who calls
``step`` and when is the caller's business. Invariant: after a step that raised, no request holds blocks or rows of that
step.
"""

from argosy.engine.replica_messages import RankStats, ReplicaStats, UpdateSettings
from argosy.engine.request import Request
from argosy.engine.scheduler import Scheduler
from argosy.messages import FinishReason, ScheduledBatch, StepOutput, TokenDelta
from argosy.runner.model_runner import ModelRunner


class EngineCore:
    """Scheduler and runner."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run in this cache.
        """
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request now; False if it is unknown or over."""
        return self.scheduler.abort(request_id)

    def finish(self, request_id: str, reason: FinishReason) -> bool:
        """End a request whose end was found in its text; the caller has reported it, so no delta follows."""
        return self.scheduler.finish_request(request_id, reason)

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def step(self) -> list[TokenDelta]:
        """One step; the new tokens of every request that got some."""
        batch = self.scheduler.schedule()
        if batch.is_empty:
            return self.scheduler.drain()
        return self.scheduler.update(batch, self._execute(batch))

    def update_settings(self, settings: UpdateSettings) -> None:
        """The exchange's settings change nothing here. Raises RuntimeError while requests are unfinished."""
        if self.has_unfinished():
            raise RuntimeError("settings change between requests only, and some are unfinished")
        if settings.max_num_batched_tokens is not None:
            self.scheduler.max_num_batched_tokens = settings.max_num_batched_tokens

    def collect_stats(self) -> ReplicaStats:
        scheduler = self.scheduler
        return ReplicaStats(
            num_steps=scheduler.num_steps,
            num_dummy_steps=0,
            num_scheduled_tokens=scheduler.num_scheduled_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_agreements=0,
            coordination_s=0.0,
            ranks=[RankStats(0, {}, self.runner.model.expert_load.local_counts())],
        )

    def _execute(self, batch: ScheduledBatch) -> StepOutput:
        try:
            return self.runner.execute(batch)
        except BaseException:
            self.scheduler.cancel_step(batch)
            raise
