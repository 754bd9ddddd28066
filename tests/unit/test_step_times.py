"""How long steps take: what is remembered of them, in one rank's loop and in a replica's."""

import random
import time

import pytest

from argosy.distributed.dp_coord import ExchangePolicy
from argosy.engine.replica_client import ReplicasClient
from argosy.engine.replica_messages import AddRequest
from argosy.engine.step_times import NUM_KEPT, StepTimes
from argosy.messages import ScheduledBatch
from argosy.sampling_params import SamplingParams
from tests.helpers.replica_simulation import BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, SimulatedLink


def test_only_the_last_steps_are_kept_and_all_with_work_are_counted() -> None:
    times = StepTimes()
    for number in range(NUM_KEPT + 3):
        times.add(0.5, number)
    assert [step.num_tokens for step in times.recent()] == list(range(3, NUM_KEPT + 3))
    assert times.total_s == 0.5 * (NUM_KEPT + 2)
    ends = [step.end_s for step in times.recent()]
    assert ends == sorted(ends) and ends[0] > 0


def test_planning_is_part_of_a_step() -> None:
    link = SimulatedLink(1, random.Random(3), ExchangePolicy("auto", 4, 1))
    scheduler = link.loops[0].scheduler
    plan = scheduler.schedule

    def plan_slowly() -> ScheduledBatch:
        time.sleep(0.01)
        return plan()

    scheduler.schedule = plan_slowly  # type: ignore[method-assign]
    client = ReplicasClient(link, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    client.add(AddRequest("r", [1, 2], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)))
    while client.has_unfinished():
        client.step()
    (stats,) = client.collect_stats()
    assert [step.duration_s >= 0.01 for step in stats.recent_steps] == [True, True]


def test_replicas_tell_their_steps_and_dummy_steps_but_not_their_sleep() -> None:
    link = SimulatedLink(2, random.Random(3), ExchangePolicy("auto", 4, 1))
    client = ReplicasClient(link, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    client.add(AddRequest("r", [1, 2, 3, 4, 5, 6], params), 0)
    while client.has_unfinished():
        client.step()
    busy, idle = client.collect_stats()
    assert [step.num_tokens for step in busy.recent_steps] == [6, 1, 1, 1, 1]
    assert [step.num_tokens for step in idle.recent_steps] == [0] * idle.num_dummy_steps and idle.num_dummy_steps == 5
    assert all(step.duration_s > 0 for step in busy.recent_steps + idle.recent_steps)
    assert sum(step.duration_s for step in busy.recent_steps) == pytest.approx(busy.step_s)
    assert sum(busy.steps_by_duration) == 5 and sum(idle.steps_by_duration) == idle.step_s == 0
