"""What ``Scheduler.update`` and the ends of requests must do; what a step computes is in ``test_scheduler.py``."""

import gc
import time
import weakref

import pytest

from argosy.engine.request import NO_ROW, Request, RequestStatus
from argosy.messages import FinishReason, ScheduledBatch, StepOutput, TokenDelta, TokenLogprobs
from tests.helpers.scheduler_simulation import Simulation, generate_alone, next_token

PROMPT = [5, 3, 8, 2, 9, 1, 7, 4, 6, 11, 12, 13]


def answer(simulation: Simulation, tokens: dict[str, list[int]]) -> list[TokenDelta]:
    """One step in which each named request samples the given tokens."""
    batch = simulation.schedule()
    names = {request.row: name for name, request in simulation.requests.items() if request.row != NO_ROW}
    return simulation.scheduler.update(batch, StepOutput([tokens[names[row]] for row in batch.rows]))


def plan(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True))


@pytest.mark.parametrize(
    ("sampling", "tokens", "end"),
    [
        ({}, [7, 0], (FinishReason.STOP, None)),
        ({"ignore_eos": True, "max_tokens": 3}, [7, 0, 7], (FinishReason.LENGTH, None)),
        ({"stop_token_ids": (9,)}, [7, 9], (FinishReason.STOP, 9)),
        ({"stop_token_ids": (0,)}, [7, 0], (FinishReason.STOP, None)),
        ({"stop_token_ids": (0,), "ignore_eos": True}, [7, 0], (FinishReason.STOP, 0)),
        ({"min_tokens": 2}, [0, 0, 0], (FinishReason.STOP, None)),
        ({"min_tokens": 2, "stop_token_ids": (9,)}, [9, 9, 9], (FinishReason.STOP, 9)),
        ({"max_tokens": 2}, [7, 7], (FinishReason.LENGTH, None)),
        ({"max_tokens": 2}, [7, 0], (FinishReason.STOP, None)),
        ({"max_tokens": 2, "min_tokens": 2}, [7, 0], (FinishReason.LENGTH, None)),
        ({"max_tokens": None}, [7] * 6, (FinishReason.LENGTH, None)),
    ],
)
def test_a_request_ends_where_it_should(
    sampling: dict[str, object], tokens: list[int], end: tuple[FinishReason, int | None]
) -> None:
    simulation = Simulation(max_model_len=10)
    request = simulation.add(PROMPT[:4], **{"ignore_eos": False, **sampling})
    for token_id in tokens[:-1]:
        (delta,) = answer(simulation, {"r0": [token_id]})
        assert (delta.new_token_ids, delta.finish_reason) == ([token_id], None)
    (delta,) = answer(simulation, {"r0": [tokens[-1]]})
    assert (delta.new_token_ids, delta.finish_reason, delta.stop_reason) == ([tokens[-1]], *end)
    assert request.output_token_ids == tokens
    simulation.ends["r0"], simulation.received["r0"] = delta, tokens
    assert not simulation.scheduler.has_unfinished()
    assert simulation.manager.num_free_blocks == simulation.manager.num_usable_blocks


def test_drafts_are_accepted_as_far_as_they_are_right() -> None:
    simulation = Simulation(max_num_batched_tokens=30)
    request = simulation.add(PROMPT[:3], max_tokens=20)
    simulation.step()
    simulation.add(PROMPT[:5], max_tokens=20)
    tokens = request.all_token_ids.copy()
    for _ in range(2):
        tokens.append(next_token(tokens))
    request.draft_token_ids = [*tokens[-2:], (next_token(tokens) + 1) % 16]
    batch = simulation.schedule()
    assert plan(batch)[0] == (0, 3, 4)
    (delta, _) = simulation.complete(batch)
    assert delta.new_token_ids == [*tokens[-2:], next_token(tokens)]
    assert request.num_computed_tokens == request.num_tokens - 1 == 6
    assert request.draft_token_ids == []
    assert plan(simulation.schedule())[0] == (0, 6, 1)


def test_a_stop_among_accepted_drafts_ends_the_request_there() -> None:
    simulation = Simulation()
    request = simulation.add(PROMPT[:3], stop_token_ids=(9,))
    answer(simulation, {"r0": [7]})
    request.draft_token_ids = [8, 9, 10]
    batch = simulation.schedule()
    logprobs = [TokenLogprobs(token_id, -1.0, 1) for token_id in (8, 9, 10, 11)]
    (delta,) = simulation.scheduler.update(batch, StepOutput([[8, 9, 10, 11]], [logprobs]))
    assert (delta.new_token_ids, delta.new_logprobs, delta.stop_reason) == ([8, 9], logprobs[:2], 9)


def test_drafts_yield_to_the_budget_and_to_the_length_limit_and_to_other_requests() -> None:
    simulation = Simulation(max_num_batched_tokens=3, max_model_len=10)
    request = simulation.add(PROMPT[:3], max_tokens=4)
    simulation.step()
    request.draft_token_ids = [1, 1, 1, 1]
    assert plan(simulation.schedule()) == [(0, 3, 3)]
    assert request.draft_token_ids == [1, 1]

    simulation = Simulation(max_model_len=10)
    request = simulation.add(PROMPT[:3], max_tokens=4)
    simulation.step()
    request.draft_token_ids = [1, 1, 1, 1]
    assert plan(simulation.schedule()) == [(0, 3, 3)]  # a bonus token after two drafts is the fourth

    simulation = Simulation(num_blocks=3, max_model_len=9)
    requests = [simulation.add(PROMPT[:3], max_tokens=5) for _ in range(2)]
    simulation.step()
    requests[0].draft_token_ids = [1, 1, 1]
    assert plan(simulation.schedule()) == [(0, 3, 1), (1, 3, 1)]
    assert requests[0].draft_token_ids == []


def test_a_preempted_request_forgets_its_drafts() -> None:
    simulation = Simulation()
    request = simulation.add(PROMPT[:3])
    simulation.step()
    request.draft_token_ids = [1, 1]
    simulation.schedule()
    simulation.scheduler.cancel_steps()
    assert plan(simulation.schedule()) == [(0, 0, 4)]
    assert request.draft_token_ids == []


def test_logprobs_travel_with_their_tokens() -> None:
    simulation = Simulation()
    simulation.add(PROMPT[:3])
    simulation.add(PROMPT[:4])
    for _ in range(2):  # as a prefill, then as a decode
        batch = simulation.schedule()
        logprobs = [[TokenLogprobs(3, -0.5, 1)], [TokenLogprobs(4, -0.25, 2)]]
        deltas = simulation.scheduler.update(batch, StepOutput([[3], [4]], logprobs))
        assert [delta.new_logprobs for delta in deltas] == logprobs


def test_output_for_the_wrong_step_or_rows_is_refused() -> None:
    simulation = Simulation(max_num_batched_tokens=4)
    simulation.add(PROMPT[:6])
    batch = simulation.schedule()
    with pytest.raises(AssertionError, match="before the update"):
        simulation.scheduler.schedule()
    with pytest.raises(AssertionError, match="0 outputs for 1 rows"):
        simulation.scheduler.update(batch, StepOutput([]))
    with pytest.raises(AssertionError, match="step 7 instead of step 0"):
        simulation.scheduler.update(ScheduledBatch(7, rows=[0]), StepOutput([[]]))
    with pytest.raises(AssertionError, match="1 tokens for"):
        simulation.scheduler.update(batch, StepOutput([[3]]))  # a chunk that ends inside the prompt samples nothing


def test_abort_at_any_stage_frees_everything_and_is_reported_once() -> None:
    simulation = Simulation(max_num_seqs=2, max_num_batched_tokens=20)
    waiting, between, in_flight, kept = (simulation.add(PROMPT[i : i + 6]) for i in (3, 0, 1, 2))
    scheduler = simulation.scheduler
    assert not scheduler.abort("unknown")
    assert scheduler.abort(waiting.request_id)
    assert not scheduler.abort(waiting.request_id)
    simulation.step()
    assert scheduler.abort(between.request_id)
    assert simulation.manager.num_free_blocks == simulation.manager.num_usable_blocks - 2
    batch = simulation.schedule()
    assert scheduler.abort(in_flight.request_id)
    assert simulation.manager.num_free_blocks == simulation.manager.num_usable_blocks - 4  # the step may write them
    assert in_flight.row != NO_ROW
    deltas = simulation.complete(batch)
    assert [(delta.request_id, delta.finish_reason) for delta in deltas] == [
        ("r1", FinishReason.ABORT),
        ("r2", FinishReason.ABORT),
        ("r3", None),
    ]
    assert in_flight.row == NO_ROW
    assert all(request.status is RequestStatus.FINISHED_ABORTED for request in (waiting, between, in_flight))
    simulation.run()
    assert kept.status is RequestStatus.FINISHED_LENGTH
    assert not scheduler.abort(kept.request_id)


def test_the_last_abort_is_reported_without_a_step() -> None:
    simulation = Simulation()
    simulation.add(PROMPT)
    simulation.step()
    simulation.scheduler.abort("r0")
    assert simulation.scheduler.has_unfinished()
    assert simulation.scheduler.schedule().is_empty
    (delta,) = simulation.scheduler.drain()
    assert (delta.new_token_ids, delta.finish_reason) == ([], FinishReason.ABORT)
    assert not simulation.scheduler.has_unfinished()
    assert simulation.scheduler.drain() == []


def test_an_id_can_be_used_again_while_the_aborted_one_is_in_flight() -> None:
    simulation = Simulation()
    simulation.add(PROMPT[:6], request_id="same")
    batch = simulation.schedule()
    simulation.scheduler.abort("same")
    again = Request("same", PROMPT[:5], simulation.requests["same"].sampling_params, ())
    simulation.scheduler.add(again)
    output = simulation.execute(batch)
    assert [delta.finish_reason for delta in simulation.scheduler.update(batch, output)] == [FinishReason.ABORT]
    assert again.num_output_tokens == 0
    assert simulation.scheduler.schedule().admitted[0].token_ids == PROMPT[:5]


def test_finish_request_reports_nothing() -> None:
    simulation = Simulation()
    request = simulation.add(PROMPT)
    simulation.step()
    assert simulation.scheduler.finish_request("r0", FinishReason.STOP)
    assert not simulation.scheduler.finish_request("r0", FinishReason.STOP)
    assert request.status is RequestStatus.FINISHED_STOPPED
    assert simulation.scheduler.drain() == []
    assert not simulation.scheduler.has_unfinished()
    assert simulation.manager.num_free_blocks == simulation.manager.num_usable_blocks


def test_requests_of_a_failed_step_start_over_with_their_tokens() -> None:
    simulation = Simulation()
    request = simulation.add(PROMPT[:6])
    simulation.step()
    tokens = request.all_token_ids.copy()
    simulation.schedule()
    simulation.scheduler.cancel_steps()
    assert (request.status, request.num_computed_tokens) == (RequestStatus.PREEMPTED, 0)
    assert simulation.schedule().admitted[0].token_ids == tokens


def test_statistics_count_steps_and_tokens() -> None:
    simulation = Simulation()
    simulation.add(PROMPT, max_tokens=4)
    simulation.run()
    assert simulation.scheduler.num_steps == 4
    assert simulation.scheduler.num_scheduled_tokens == len(PROMPT) + 3


def test_nothing_remains_of_finished_requests() -> None:
    simulation = Simulation()
    kept = simulation.scheduler
    for i in range(50):
        simulation.add(PROMPT, max_tokens=2 if i % 2 else 20)
    for i in range(10, 40):
        kept.abort(f"r{i}")
    simulation.run()
    watched = [_Watched(f"w{i}", PROMPT, simulation.requests["r0"].sampling_params, ()) for i in range(20)]
    alive = [weakref.ref(request) for request in watched]
    for request in watched:
        kept.add(request)
    for request in watched[3:]:
        kept.abort(request.request_id)
    del watched, request
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 6  # at most half of what is queued has ended


def test_a_request_alone_is_what_the_specification_says() -> None:
    simulation = Simulation()
    request = simulation.add(PROMPT, max_tokens=10, ignore_eos=False)
    simulation.run()
    assert request.output_token_ids == generate_alone(PROMPT, request.sampling_params, 64)[0]


class _Watched(Request):
    """With a weak reference, which slots rule out."""

    __slots__ = ("__weakref__",)


def test_every_delta_says_how_long_its_request_was_queued() -> None:
    """The first wait counts, not that after a preemption; and a request that comes later has not waited for it."""
    simulation = Simulation(max_model_len=10)
    simulation.add(PROMPT[:4], max_tokens=3)
    time.sleep(0.02)
    (first,) = answer(simulation, {"r0": [7]})
    time.sleep(0.02)
    simulation.add(PROMPT[:3], max_tokens=3)
    second = {delta.request_id: delta.queued_s for delta in answer(simulation, {"r0": [7], "r1": [7]})}
    assert first.queued_s >= 0.02 and second["r0"] == first.queued_s
    assert 0 < second["r1"] < 0.02
