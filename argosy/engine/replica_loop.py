"""The step loop of a replica's leader: commands in, schedule, agree, execute, report; and its sleep.

A step has two halves, ``propose`` and ``carry_out``, with the agreement of all leaders between them. With asynchronous
scheduling, what it made is asked for only after the next one has started. Sockets, tensors and the other ranks are
behind ``StepExecutor`` and ``report``, so a test can run many leaders in one thread. Invariant: a leader sleeps only
after an agreement that nobody has work, so all leaders sleep before the same step, and with nothing in flight; only
``Wake``, which all of them get, ends the sleep. No leader can wait alone in a collective.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from argosy.distributed.dp_coord import ExchangePolicy, StepAgreement, StepProposal
from argosy.distributed.recordings import NO_RECORDINGS
from argosy.engine.replica_messages import (
    AbortRequest,
    AddRequest,
    CollectStats,
    Command,
    FinishRequest,
    Idle,
    RankStats,
    ReplicaStats,
    Report,
    Shutdown,
    StepDeltas,
    UpdateSettings,
    Wake,
)
from argosy.engine.request import Request
from argosy.engine.scheduler import Scheduler
from argosy.engine.step_times import StepTimes
from argosy.messages import ScheduledBatch, StepOutput, TokenDelta


class StepExecutor(Protocol):
    """All ranks of the replica."""

    def start(self, batch: ScheduledBatch, agreement: StepAgreement) -> None: ...

    def finish(self) -> StepOutput:
        """Of the oldest step that was started and not finished."""

    def execute_dummy(self, agreement: StepAgreement) -> None: ...

    def collect_stats(self) -> list[RankStats]: ...

    def shut_down(self) -> None: ...


class Coordinator(Protocol):
    """Of ``DPCoordinator``, what statistics read."""

    @property
    def num_agreements(self) -> int: ...

    @property
    def coordination_s(self) -> float: ...


class ReplicaLoop:
    """One leader. ``report`` takes what the driver must hear; it sleeps before step 0 when it is made."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: StepExecutor,
        *,
        policy: ExchangePolicy,
        eos_token_ids: tuple[int, ...],
        coordinator: Coordinator,
        report: Callable[[Report], None],
    ) -> None:
        self.scheduler = scheduler
        self.policy = policy
        self.step = 0
        self.is_asleep = True
        self.is_stopped = False
        self.num_dummy_steps = 0
        self._recordings = policy.recordings  # all there are, also while none is to be replayed
        self.times = StepTimes()
        self._proposed_s = 0.0  # how long the last proposal took
        self._executor = executor
        self._eos_token_ids = eos_token_ids
        self._coordinator = coordinator
        self._report = report
        self._batch: ScheduledBatch | None = None  # proposed, not carried out yet
        self._in_flight: deque[ScheduledBatch] = deque()  # started, oldest first

    def receive(self, command: Command) -> None:
        """Between steps, in the order of arrival.

        Raises:
            RuntimeError: woken for another step than the one this leader sleeps before.
        """
        match command:
            case AddRequest():
                self.scheduler.add(build_request(command, self._eos_token_ids))
            case AbortRequest(request_id):
                self.scheduler.abort(request_id)
            case FinishRequest(request_id, reason):
                self.scheduler.finish_request(request_id, reason)
            case Wake(step):
                self._wake(step)
            case UpdateSettings():
                self._update_settings(command)
            case CollectStats(has_ranks):
                self._report(self._collect_stats(has_ranks))
            case Shutdown():
                self._executor.shut_down()
                self.is_stopped = True

    def propose(self) -> StepProposal:
        """Schedule the next step. ``carry_out`` must follow before any command."""
        assert not self.is_asleep and self._batch is None
        started_s = time.monotonic()
        self._batch = self.scheduler.schedule()
        if self._batch.is_empty and self._in_flight:
            self._finish_oldest()  # nothing can be planned before it is known
            self._batch = self.scheduler.schedule()
        self._proposed_s = time.monotonic() - started_s
        return StepProposal(self.step, self._batch.num_tokens, self._batch.decode_length)

    def carry_out(self, agreement: StepAgreement) -> None:
        """Start the step that all leaders agreed on, and finish the one before; or fall asleep."""
        assert self._batch is not None and agreement.step == self.step
        batch, self._batch = self._batch, None
        self.step += 1
        started_s = time.monotonic()
        self._carry_out(batch, agreement)
        if not self.is_asleep:
            self.times.add(self._proposed_s + time.monotonic() - started_s, batch.num_tokens)

    def _carry_out(self, batch: ScheduledBatch, agreement: StepAgreement) -> None:
        if not batch.is_empty:
            self._executor.start(batch, agreement)
            self._in_flight.append(batch)
            if len(self._in_flight) == self.scheduler.max_steps_in_flight:
                self._finish_oldest()
            return
        self._report_deltas(self.scheduler.drain())
        if agreement.has_work:
            self._executor.execute_dummy(agreement)
            self.num_dummy_steps += 1
        else:
            self.is_asleep = True
            self._report(Idle(self.step))

    def _finish_oldest(self) -> None:
        self._report_deltas(self.scheduler.update(self._in_flight.popleft(), self._executor.finish()))

    def _report_deltas(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._report(StepDeltas(deltas))

    def _wake(self, step: int) -> None:
        if not self.is_asleep or step != self.step:
            state = f"sleeps before step {self.step}" if self.is_asleep else f"is awake at step {self.step}"
            raise RuntimeError(f"woken for step {step}, but this leader {state}; this is a bug, restart the engine")
        self.is_asleep = False

    def _update_settings(self, settings: UpdateSettings) -> None:
        assert self.is_asleep, "settings may change only while all leaders sleep, or they would agree on two policies"
        if settings.max_num_batched_tokens is not None:
            self.scheduler.max_num_batched_tokens = settings.max_num_batched_tokens
        if settings.async_scheduling is not None:
            self.scheduler.async_scheduling = settings.async_scheduling
        policy, ll_max = self.policy, settings.ll_max_tokens_per_rank
        if settings.enforce_eager is not None:
            recordings = NO_RECORDINGS if settings.enforce_eager else self._recordings
            policy = msgspec.structs.replace(policy, recordings=recordings)
        self.policy = msgspec.structs.replace(
            policy,
            ep_mode=settings.ep_mode or policy.ep_mode,
            ll_max_tokens_per_rank=policy.ll_max_tokens_per_rank if ll_max is None else ll_max,
        )

    def _collect_stats(self, has_ranks: bool) -> ReplicaStats:
        return count_replica(
            self.scheduler,
            num_dummy_steps=self.num_dummy_steps,
            num_agreements=self._coordinator.num_agreements,
            coordination_s=self._coordinator.coordination_s,
            times=self.times,
            ranks=self._executor.collect_stats() if has_ranks else [],
        )


def count_replica(
    scheduler: Scheduler,
    *,
    num_dummy_steps: int = 0,
    num_agreements: int = 0,
    coordination_s: float = 0.0,
    times: StepTimes,
    ranks: list[RankStats],
) -> ReplicaStats:
    """What a replica's scheduler knows, beside what is given."""
    blocks = scheduler.block_manager
    return ReplicaStats(
        num_steps=scheduler.num_steps,
        num_dummy_steps=num_dummy_steps,
        num_scheduled_tokens=scheduler.num_scheduled_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_agreements=num_agreements,
        coordination_s=coordination_s,
        ranks=ranks,
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        blocks_total=blocks.num_usable_blocks,
        blocks_used=blocks.num_usable_blocks - blocks.num_free_blocks,
        blocks_cached=blocks.num_cached_blocks,
        num_queried_tokens=scheduler.num_queried_tokens,
        num_cached_tokens=scheduler.num_cached_tokens,
        step_s=times.total_s,
        steps_by_duration=list(times.counts),
        recent_steps=times.recent(),
    )


def build_request(command: AddRequest, eos_token_ids: tuple[int, ...]) -> Request:
    """The scheduler's form of a request."""
    return Request(
        command.request_id,
        command.prompt_token_ids,
        command.sampling_params,
        eos_token_ids,
        priority=command.priority,
        cache_salt=command.cache_salt,
        output_token_ids=command.output_token_ids,
    )
