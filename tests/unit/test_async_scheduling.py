"""The scheduler with one step in flight, rule by rule. Random traffic is in ``test_scheduler_invariants.py``."""

import pytest

from argosy.engine.request import NO_ROW, RequestStatus
from argosy.messages import FinishReason, ScheduledBatch, StepOutput
from tests.helpers.scheduler_simulation import Simulation, generate_alone

PROMPT = [5, 3, 8, 2, 9, 1, 7, 4, 6, 11, 12, 13]


def build(**sizes: int) -> Simulation:
    return Simulation(is_overlapped=True, **sizes)


def plan(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True))


def start(simulation: Simulation) -> ScheduledBatch:
    batch = simulation.schedule()
    simulation.start(batch)
    return batch


def test_a_decode_goes_on_behind_the_token_in_flight() -> None:
    simulation = build()
    request = simulation.add(PROMPT[:5], max_tokens=4)
    first, second = start(simulation), start(simulation)
    assert [plan(first), plan(second)] == [[(0, 0, 5)], [(0, 5, 1)]]
    assert [first.num_in_flight, second.num_in_flight] == [0, 1]
    assert request.num_output_tokens == 0
    (delta,) = simulation.finish()
    assert delta.new_token_ids == request.output_token_ids and request.num_tokens == 6
    assert plan(start(simulation)) == [(0, 6, 1)]
    simulation.run()
    assert simulation.scheduler.num_steps == 4  # as many as one at a time


def test_at_most_two_steps_are_in_flight_and_they_are_updated_in_order() -> None:
    simulation = build()
    simulation.add(PROMPT[:5])
    batches = [start(simulation), start(simulation)]
    with pytest.raises(AssertionError, match=r"before the update\(\) of step 0"):
        simulation.scheduler.schedule()
    with pytest.raises(AssertionError, match="step 1 instead of step 0"):
        simulation.scheduler.update(batches[1], StepOutput([[3]]))


def test_a_request_that_the_token_in_flight_ends_by_length_is_not_planned() -> None:
    simulation = build()
    simulation.add(PROMPT[:5], max_tokens=1)
    other = simulation.add(PROMPT[:4], max_tokens=2)
    start(simulation)
    assert plan(start(simulation)) == [(other.row, 4, 1)]
    simulation.finish()
    assert simulation.ends["r0"].finish_reason is FinishReason.LENGTH
    assert simulation.requests["r0"].row == NO_ROW  # nothing is held for a step that it takes no part in
    batch = simulation.schedule()
    assert batch.is_empty and simulation.scheduler.has_unfinished()
    simulation.run()


def test_chunks_of_a_prompt_follow_the_chunk_in_flight() -> None:
    simulation = build(max_num_batched_tokens=5)
    simulation.add(PROMPT, max_tokens=3)
    plans = []
    for _ in range(5):
        plans += plan(start(simulation))
        if len(simulation.in_flight) == 2:
            simulation.finish()
    assert plans == [(0, 0, 5), (0, 5, 5), (0, 10, 2), (0, 12, 1), (0, 13, 1)]
    simulation.run()


@pytest.mark.parametrize("sampling", [{"stop_token_ids": tuple(range(16))}, {"stop_token_ids": tuple(range(1, 16))}])
def test_what_comes_after_a_stop_is_dropped_and_its_blocks_are_held_until_then(sampling: dict[str, object]) -> None:
    simulation = build(enable_prefix_caching=False)
    request = simulation.add(PROMPT[:4], ignore_eos=False, **sampling)
    start(simulation)
    start(simulation)
    (delta,) = simulation.finish()
    assert delta.finish_reason is FinishReason.STOP and len(delta.new_token_ids) == 1
    assert request.row == 0 and len(request.block_ids) == 2  # the second step writes there
    assert not simulation.scheduler.has_unfinished()
    assert simulation.schedule().is_empty
    assert simulation.finish() == []
    assert request.num_output_tokens == 1 and request.row == NO_ROW
    simulation.run()


def test_blocks_are_published_only_with_known_tokens() -> None:
    simulation = build(block_size=4)
    request = simulation.add(PROMPT[:7], max_tokens=9)
    start(simulation)
    start(simulation)  # computes position 7, which fills the second block with a token that nobody knows
    simulation.finish()  # now it is known, but not computed
    assert request.num_published_blocks == 1
    simulation.finish()
    assert request.num_published_blocks == 2
    other = simulation.add([*request.all_token_ids[:8], 1], max_tokens=1)
    simulation.run()
    assert other.num_cached_tokens == 8


def test_a_preempted_request_samples_the_token_in_flight_again() -> None:
    simulation = build(num_blocks=7, max_model_len=20, max_num_seqs=2, enable_prefix_caching=False)
    old, young = (simulation.add(PROMPT[i : i + 8], max_tokens=9) for i in range(2))
    known = 0
    while young.status is not RequestStatus.PREEMPTED:
        known = young.num_output_tokens
        start(simulation)
        if len(simulation.in_flight) == 2:
            simulation.finish()
    assert old.status is RequestStatus.RUNNING
    assert young.num_output_tokens == known > 0  # the update after it said nothing of the young one
    assert (young.row, young.block_ids, young.num_computed_tokens) == (NO_ROW, [], 0)
    simulation.run()


def test_an_abort_is_reported_once_and_holds_until_the_last_step_that_may_write() -> None:
    simulation = build()
    request = simulation.add(PROMPT[:6])
    kept = simulation.add(PROMPT[:6])
    start(simulation)
    start(simulation)
    assert simulation.scheduler.abort(request.request_id)
    first = simulation.finish()
    assert [(delta.request_id, delta.finish_reason) for delta in first] == [("r0", FinishReason.ABORT), ("r1", None)]
    assert request.row == 0
    second = simulation.finish()
    assert [delta.request_id for delta in second] == ["r1"] and request.row == NO_ROW
    simulation.run()
    assert kept.status is RequestStatus.FINISHED_LENGTH


def test_a_failure_cancels_both_steps() -> None:
    simulation = build()
    request = simulation.add(PROMPT[:6])
    stopped = simulation.add(PROMPT[:4], ignore_eos=False, stop_token_ids=tuple(range(16)))
    simulation.step()  # the second step is in flight now
    tokens = request.all_token_ids.copy()
    assert stopped.row != NO_ROW and stopped.status is RequestStatus.FINISHED_STOPPED
    start(simulation)
    simulation.cancel()
    assert (request.status, request.num_computed_tokens, stopped.row) == (RequestStatus.PREEMPTED, 0, NO_ROW)
    assert simulation.schedule().admitted[0].token_ids == tokens
    assert tokens[6:] == generate_alone(PROMPT[:6], request.sampling_params, 64)[0][:1]


def test_nothing_is_planned_behind_drafts() -> None:
    simulation = build()
    request = simulation.add(PROMPT[:3], max_tokens=9)
    start(simulation)
    simulation.finish()
    request.draft_token_ids = [1, 1]
    assert plan(start(simulation)) == [(0, 3, 3)]
    assert simulation.schedule().is_empty
    simulation.finish()
    assert request.num_computed_tokens == request.num_tokens - 1
    simulation.run()
