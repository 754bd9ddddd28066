"""The scheduler's rules, one by one. Random traffic is in ``test_scheduler_invariants.py``."""

import pytest

from argosy.engine.request import NO_ROW, Request, RequestStatus
from argosy.messages import ScheduledBatch
from tests.helpers.scheduler_simulation import Simulation

PROMPT = [5, 3, 8, 2, 9, 1, 7, 4, 6, 11, 12, 13]


def plan(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True))


def test_a_prompt_is_computed_at_once_then_one_token_a_step() -> None:
    simulation = Simulation()
    request = simulation.add(PROMPT[:5], max_tokens=3)
    batch = simulation.schedule()
    admitted = batch.admitted[0]
    assert plan(batch) == [(0, 0, 5)]
    assert (admitted.row, admitted.request_id, admitted.token_ids) == (0, "r0", PROMPT[:5])
    assert (admitted.num_prompt_tokens, admitted.num_computed_tokens) == (5, 0)
    assert admitted.block_ids == request.block_ids
    assert len(admitted.block_ids) == 2
    simulation.complete(batch)
    for computed in (5, 6):
        batch = simulation.schedule()
        assert plan(batch) == [(0, computed, 1)]
        assert not batch.admitted and not batch.new_block_ids
        simulation.complete(batch)
    assert admitted.token_ids == PROMPT[:5]  # a batch is a value: the request's growth does not show in it
    assert request.status is RequestStatus.FINISHED_LENGTH
    simulation.run()


def test_a_long_prompt_is_computed_in_chunks_within_the_budget() -> None:
    simulation = Simulation(max_num_batched_tokens=5)
    simulation.add(PROMPT, max_tokens=2)
    plans, starts = [], []
    for _ in range(4):
        batch = simulation.schedule()
        plans.append((plan(batch), [len(block_ids) for _, block_ids in batch.new_block_ids]))
        starts += batch.admitted
        simulation.complete(batch)
    assert plans == [([(0, 0, 5)], []), ([(0, 5, 5)], [1]), ([(0, 10, 2)], []), ([(0, 12, 1)], [1])]
    assert len(starts) == 1 and len(starts[0].block_ids) == 2  # not the blocks that were added later
    simulation.run()


def test_running_requests_come_before_waiting_ones_and_decodes_before_prefills() -> None:
    simulation = Simulation(max_num_batched_tokens=8)
    simulation.add(PROMPT[:2])
    simulation.step()
    simulation.add(PROMPT)
    simulation.add(PROMPT[:3])
    batch = simulation.schedule()
    assert plan(batch) == [(0, 2, 1), (1, 0, 7)]
    simulation.complete(batch)
    assert plan(simulation.schedule()) == [(0, 3, 1), (1, 7, 5), (2, 0, 2)]


def test_a_prefill_with_one_token_left_counts_as_a_decode() -> None:
    simulation = Simulation(max_num_batched_tokens=7)
    simulation.add(PROMPT[:8], priority=1)
    simulation.step()
    simulation.add(PROMPT[:3])
    batch = simulation.schedule()
    assert plan(batch) == [(0, 7, 1), (1, 0, 3)]
    simulation.complete(batch)
    simulation.run()


def test_the_smallest_free_row_is_given() -> None:
    simulation = Simulation(max_num_seqs=3)
    for _ in range(3):
        simulation.add(PROMPT[:2], max_tokens=30)
    simulation.step()
    simulation.scheduler.abort("r2")
    simulation.scheduler.abort("r0")
    added = [simulation.add(PROMPT[:2], max_tokens=30) for _ in range(3)]
    simulation.step()
    assert [request.row for request in added] == [0, 2, NO_ROW]


def test_lower_priority_values_come_first_and_ties_by_arrival() -> None:
    simulation = Simulation(max_num_seqs=1)
    for priority in (1, 0, 1, -1, 0):
        simulation.add(PROMPT[:2], max_tokens=1, priority=priority)
    simulation.run()
    assert list(simulation.ends) == ["r3", "r1", "r4", "r0", "r2"]


@pytest.mark.parametrize(
    ("prompt_token_ids", "max_tokens", "message"),
    [
        ([], 4, "the prompt is empty"),
        ([1] * 20, 4, r"20 tokens, but max_model_len is 20 .* raise --max-model-len"),
        ([1] * 10, 8, r"10 prompt tokens and an output of up to 8 need 5 cache blocks of 4 tokens, .* has 4; lower"),
        ([1] * 10, None, r"an output of up to 10 need 5 cache blocks"),
    ],
)
def test_what_could_never_run_is_refused(prompt_token_ids: list[int], max_tokens: int | None, message: str) -> None:
    simulation = Simulation(num_blocks=5, max_model_len=20)
    with pytest.raises(ValueError, match=message):
        simulation.add(prompt_token_ids, max_tokens=max_tokens)
    assert not simulation.scheduler.has_unfinished()


def test_a_request_that_needs_every_block_runs() -> None:
    simulation = Simulation(num_blocks=5, max_model_len=20)
    request = simulation.add([1] * 10, max_tokens=7)
    simulation.run()
    assert request.num_tokens == 17  # 16 slots: the last token is never computed


def test_an_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    simulation = Simulation()
    simulation.add(PROMPT[:2], request_id="same")
    with pytest.raises(ValueError, match="'same' is already in use"):
        simulation.scheduler.add(Request("same", PROMPT, simulation.requests["same"].sampling_params, ()))
    simulation.run()
    simulation.scheduler.add(Request("same", PROMPT, simulation.requests["same"].sampling_params, ()))
    assert simulation.scheduler.num_waiting == 1


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_seqs \(0\)"):
        Simulation(max_num_seqs=0)


def test_the_youngest_is_preempted_and_resumes_first_with_its_tokens() -> None:
    simulation = Simulation(num_blocks=7, max_model_len=20, max_num_seqs=2, enable_prefix_caching=False)
    old, young, _ = (simulation.add(PROMPT[i : i + 8], max_tokens=9) for i in range(3))
    simulation.step()
    assert [request.status for request in (old, young)] == [RequestStatus.RUNNING] * 2
    simulation.step()
    output = young.output_token_ids
    while young.status is RequestStatus.RUNNING:
        output = young.output_token_ids
        simulation.step()
    assert young.status is RequestStatus.PREEMPTED
    assert young.output_token_ids == output and len(output) > 1
    assert (young.row, young.block_ids, young.num_computed_tokens) == (NO_ROW, [], 0)
    assert simulation.scheduler.num_preemptions == 1
    while not (batch := simulation.schedule()).admitted:
        simulation.complete(batch)
    assert batch.admitted[0].request_id == "r1"  # before r2, which arrived later
    assert batch.admitted[0].token_ids == young.all_token_ids
    simulation.complete(batch)
    simulation.run()


def test_the_youngest_waits_with_its_blocks_rather_than_preempt_itself_or_an_older() -> None:
    simulation = Simulation(num_blocks=6, max_model_len=20, enable_prefix_caching=False)
    old = simulation.add(PROMPT[:5], max_tokens=8)  # 3 blocks in the end
    young = simulation.add(PROMPT[:12], max_tokens=4)  # 3 blocks, then 4
    simulation.step()
    batch = simulation.schedule()
    assert plan(batch) == [(old.row, 5, 1)]
    assert young.status is RequestStatus.RUNNING and len(young.block_ids) == 3
    simulation.complete(batch)
    simulation.run()


def test_nobody_starts_with_blocks_that_were_taken_from_a_preempted_request() -> None:
    simulation = Simulation(num_blocks=7, max_model_len=20, enable_prefix_caching=False)
    simulation.add(PROMPT[:8], max_tokens=9)
    young = simulation.add(PROMPT[:12], max_tokens=9)
    simulation.step()
    simulation.add(PROMPT[:3], priority=2, max_tokens=1)
    simulation.add(PROMPT[:3], priority=-2, max_tokens=1)
    simulation.manager.allocate(1)  # as another holder of blocks would
    batch = simulation.scheduler.schedule()
    assert young.status is RequestStatus.PREEMPTED
    assert plan(batch) == [(0, 8, 1)]
    assert simulation.scheduler.num_waiting == 3


def test_a_running_request_past_the_budget_waits_its_turn() -> None:
    simulation = Simulation(max_num_batched_tokens=2)
    requests = [simulation.add(PROMPT[:1]) for _ in range(2)]
    simulation.step()
    requests[0].draft_token_ids = [1, 1]
    assert plan(simulation.schedule()) == [(0, 1, 2)]
    assert requests[1].status is RequestStatus.RUNNING


def test_a_chunk_shrinks_to_the_blocks_that_are_free() -> None:
    simulation = Simulation(num_blocks=8, max_num_batched_tokens=13, max_model_len=40, enable_prefix_caching=False)
    simulation.add([1] * 3, max_tokens=9)
    simulation.add([2] * 20, max_tokens=2)
    simulation.step()
    simulation.manager.allocate(2)  # as another holder of blocks would
    batch = simulation.scheduler.schedule()
    assert plan(batch) == [(0, 3, 1), (1, 10, 6)]
    assert simulation.scheduler.num_preemptions == 0


def test_a_prefix_is_found_after_the_step_that_computes_it_and_not_before() -> None:
    simulation = Simulation(max_num_batched_tokens=20)
    first, same_step = simulation.add(PROMPT, max_tokens=1), simulation.add(PROMPT, max_tokens=1)
    simulation.step()
    later = simulation.add(PROMPT, max_tokens=1)
    simulation.step()
    whole = simulation.add([*PROMPT, 1], max_tokens=1)
    (delta,) = simulation.step()
    assert [first.num_cached_tokens, same_step.num_cached_tokens] == [0, 0]
    assert later.num_cached_tokens == 8  # never the whole sequence
    assert whole.num_cached_tokens == delta.num_cached_tokens == 12
    assert simulation.scheduler.num_cached_tokens == 20
    simulation.run()


def test_computed_chunks_of_an_unfinished_prompt_are_shared() -> None:
    simulation = Simulation(max_num_batched_tokens=6, max_num_seqs=3)
    simulation.add(PROMPT, max_tokens=1)
    simulation.step()  # computes 6 of 12: one full block
    simulation.scheduler.abort("r0")
    request = simulation.add(PROMPT, max_tokens=1)
    assert plan(simulation.schedule()) == [(0, 4, 6)]
    assert request.num_cached_tokens == 4


def test_a_block_filled_by_decoding_is_shared_from_the_next_step_on() -> None:
    simulation = Simulation(enable_prefix_caching=True)
    request = simulation.add(PROMPT[:6], max_tokens=20)
    for _ in range(3):
        simulation.step()
    assert request.num_computed_tokens == 8
    simulation.add([*request.all_token_ids[:8], 1], max_tokens=1)
    simulation.step()
    assert simulation.requests["r1"].num_cached_tokens == 8


def test_the_next_turn_finds_the_blocks_of_the_answer() -> None:
    simulation = Simulation()
    first = simulation.add(PROMPT[:5], max_tokens=8)
    simulation.run()
    turn = simulation.add([*first.all_token_ids, 1, 2], max_tokens=2)
    simulation.run()
    assert turn.num_cached_tokens == 12  # of 13 tokens, the last is never computed


def test_salts_separate_equal_prompts() -> None:
    simulation = Simulation()
    for salt in (None, "a", "b", "a", None):
        simulation.add(PROMPT, cache_salt=salt, max_tokens=1)
        simulation.run()
    assert [request.num_cached_tokens for request in simulation.requests.values()] == [0, 0, 0, 8, 8]


def test_a_preempted_request_reports_no_cached_tokens_of_its_own() -> None:
    simulation = Simulation()
    request = simulation.add(PROMPT, max_tokens=3)
    simulation.step()
    simulation.schedule()
    simulation.scheduler.cancel_steps()
    assert plan(simulation.schedule()) == [(0, 12, 1)]  # its own blocks save the work
    assert request.num_cached_tokens == 0
