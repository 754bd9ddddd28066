"""The step loop's body: schedule -> execute -> update, for one replica. It knows tokens, not text.

Who calls ``step`` and when is the caller's business (``generation.py`` today). Invariant: after a step that raised, no
request holds blocks or rows of that step.
"""

from argosy.engine.request import Request
from argosy.engine.scheduler import Scheduler
from argosy.messages import FinishReason, ScheduledBatch, StepOutput, TokenDelta
from argosy.runner.model_runner import ModelRunner


class EngineCore:
    """Scheduler and runner of one replica."""

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

    def _execute(self, batch: ScheduledBatch) -> StepOutput:
        try:
            return self.runner.execute(batch)
        except BaseException:
            self.scheduler.cancel_step(batch)
            raise
