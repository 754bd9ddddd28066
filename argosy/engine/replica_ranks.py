"""The ranks of one replica as one executor: the leader sends each step's plan to the others, and all execute it.

Every rank samples the same tokens from the same logits, so no result travels back. Nothing is scheduled here; how many
steps may be in flight follows from the plans. Invariant: a plan is sent before the leader starts to execute it, and the
others execute plans in the order sent, so all ranks of a replica enter the same collectives in the same order.
"""

from collections import deque
from collections.abc import Callable

from argosy.distributed.dp_coord import StepAgreement
from argosy.distributed.ep_types import ExchangePlan
from argosy.engine.meeting_points import PlanHub, PlanSpoke
from argosy.engine.replica_messages import CollectStats, RankStats, Shutdown, StepPlan
from argosy.messages import ScheduledBatch, StepOutput
from argosy.runner.model_runner import ModelRunner, StepInFlight

STATS_TIMEOUT_S = 30.0


class ReplicaRanks:
    """``StepExecutor`` of a leader: its own runner, and the ranks that follow it."""

    def __init__(
        self, runner: ModelRunner, hub: PlanHub, followers: tuple[int, ...], count_stats: Callable[[], RankStats]
    ) -> None:
        self._runner = runner
        self._hub = hub
        self._followers = followers
        self._count_stats = count_stats
        self._in_flight: deque[StepInFlight] = deque()

    def start(self, batch: ScheduledBatch, agreement: StepAgreement) -> None:
        self._hub.send_to_all(self._followers, StepPlan(agreement, batch))
        self._in_flight.append(self._runner.start(batch, _exchange_plan(agreement), agreement.recording))

    def finish(self) -> StepOutput:
        return self._runner.finish(self._in_flight.popleft())

    def execute_dummy(self, agreement: StepAgreement) -> None:
        self._hub.send_to_all(self._followers, StepPlan(agreement))
        self._runner.execute_dummy(_exchange_plan(agreement), agreement.recording)

    def collect_stats(self) -> list[RankStats]:
        """Of the leader, then of its followers in rank order.

        Raises:
            RuntimeError: a follower did not answer.
        """
        self._hub.send_to_all(self._followers, CollectStats())
        answers = self._hub.receive_from(self._followers, STATS_TIMEOUT_S)
        stats = [answers[rank] for rank in self._followers]
        return [self._count_stats(), *(each for each in stats if isinstance(each, RankStats))]

    def shut_down(self) -> None:
        self._hub.send_to_all(self._followers, Shutdown())


def follow_leader(spoke: PlanSpoke, runner: ModelRunner, count_stats: Callable[[], RankStats]) -> None:
    """What a rank that does not lead does until it is told to end."""
    in_flight: deque[StepInFlight] = deque()
    while True:
        for message in spoke.receive(waits=True):
            match message:
                case StepPlan(agreement, None):
                    runner.execute_dummy(_exchange_plan(agreement), agreement.recording)
                case StepPlan(agreement, batch):
                    assert batch is not None
                    while len(in_flight) > batch.num_in_flight:  # the leader knew the others' tokens: so must we
                        runner.finish(in_flight.popleft())
                    in_flight.append(runner.start(batch, _exchange_plan(agreement), agreement.recording))
                case CollectStats():
                    spoke.send(count_stats())
                case Shutdown():
                    return


def _exchange_plan(agreement: StepAgreement) -> ExchangePlan:
    return ExchangePlan(agreement.mode, agreement.max_tokens_per_rank)
