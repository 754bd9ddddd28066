"""A replica without requests, for ten thousand steps: it joins every collective, counts dummy steps, never hangs."""

import pytest

from argosy import LLM, RequestOutput, SamplingParams

PROMPTS = [[5, 6, 7], [8, 9]]  # one at a time, so that every step has one token of output


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("num_rounds", "max_tokens"), [(4, 25), pytest.param(20, 250, marks=pytest.mark.slow)], ids=["200", "10000"]
)
def test_an_idle_replica_joins_every_step_and_counts_it(num_rounds: int, max_tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    tokens: list[list[list[int]]] = []
    with LLM(dp_size=2, device="cpu", num_threads=1, max_model_len=512, max_num_seqs=1) as llm:
        for _ in range(num_rounds):  # between them, all sleep
            results = llm.generate(PROMPTS, params, data_parallel_rank=0)
            tokens.append([result.outputs[0].token_ids for result in results if isinstance(result, RequestOutput)])
        busy, idle = llm.collect_stats()
    assert all(each == tokens[0] for each in tokens) and [len(each) for each in tokens[0]] == [max_tokens] * 2
    num_steps = num_rounds * len(PROMPTS) * max_tokens
    assert (busy.num_steps, busy.num_dummy_steps) == (num_steps, 0)
    assert (idle.num_steps, idle.num_dummy_steps) == (0, num_steps)
    assert busy.num_agreements == idle.num_agreements
