"""``LLM`` on two replicas of two ranks each: the tokens of one rank, whoever computes them and however they travel."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from argosy import LLM, RequestOutput, SamplingParams
from argosy.distributed.expert_load import merge_local_counts
from argosy.engine.generation import Result
from argosy.engine.replica_client import ReplicasClient
from argosy.sampling_params import StructuredOutputsParams
from tests.helpers.tolerance import FP32_LOGITS_ATOL

NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SETTINGS: dict[str, object] = {"device": "cpu", "dtype": "float32", "num_threads": 1, "max_model_len": 256}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dp_size=2, tp_size=2, **SETTINGS) as llm:  # type: ignore[arg-type]
        yield llm


@pytest.fixture(scope="module")
def one_rank() -> LLM:
    return LLM(**SETTINGS)  # type: ignore[arg-type]


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in (1, 5, 63, 64, 130)]


def _tokens(results: list[Result]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in results if isinstance(output, RequestOutput)]


def _ends(results: list[Result]) -> list[tuple[list[int], str | None, int | str | None]]:
    outputs = [result.outputs[0] for result in results if isinstance(result, RequestOutput)]
    return [(output.token_ids, output.finish_reason, output.stop_reason) for output in outputs]


def _prompt_logprobs(results: list[Result]) -> list[float]:
    """All numbers, with marks between requests and tokens that would not pass for another's."""
    numbers: list[float] = []
    for result in results:
        assert isinstance(result, RequestOutput)
        numbers.append(1000.0 if result.prompt_logprobs is None else 2000.0)
        for entry in result.prompt_logprobs or []:
            numbers += [3000.0] if entry is None else [entry.token_id, entry.logprob, *entry.top_logprobs]
    return numbers


@pytest.fixture(scope="module")
def alone(one_rank: LLM) -> list[list[int]]:
    return _tokens(one_rank.generate(_prompts(), GREEDY))


@pytest.mark.parametrize("max_num_batched_tokens", [64, 2048])
@pytest.mark.parametrize("data_parallel_rank", [None, 1])
@pytest.mark.parametrize("ep_mode", ["high_throughput", "low_latency", "all_gather"])
def test_tokens_are_those_of_one_rank(
    llm: LLM, alone: list[list[int]], ep_mode: str, data_parallel_rank: int | None, max_num_batched_tokens: int
) -> None:
    llm.update_settings(ep_mode=ep_mode, max_num_batched_tokens=max_num_batched_tokens)  # type: ignore[arg-type]
    assert llm.config.ep_mode == ep_mode
    results = llm.generate(_prompts(), GREEDY, data_parallel_rank=data_parallel_rank)
    assert _tokens(results) == alone


@pytest.mark.parametrize("data_parallel_rank", [None, 1])
def test_asynchronous_scheduling_changes_no_token(
    llm: LLM, one_rank: LLM, alone: list[list[int]], data_parallel_rank: int | None
) -> None:
    """Ends of every kind, and replicas that fall idle while others go on, twice in a row."""
    params = [
        dataclasses.replace(GREEDY, max_tokens=1 + 5 * i, ignore_eos=False, stop_token_ids=tuple(range(0, 3000, 7)))
        for i in range(4)
    ]
    params.append(SamplingParams(temperature=0.0, max_tokens=25, repetition_penalty=1.4, min_tokens=6, logprobs=2))
    expected = _ends(one_rank.generate(_prompts(), params))
    assert {end for _, end, _ in expected} == {"length", "stop"}
    llm.update_settings(ep_mode="auto", max_num_batched_tokens=64, async_scheduling=True)
    try:
        for _ in range(2):
            assert _ends(llm.generate(_prompts(), params, data_parallel_rank=data_parallel_rank)) == expected
        # A long prompt in the row of a short one, of which the last thing that its ranks did was to start a step.
        for prompt, tokens in zip(_prompts()[1::3], alone[1::3], strict=True):
            assert _tokens(llm.generate([prompt], GREEDY, data_parallel_rank=1)) == [tokens]
    finally:
        llm.update_settings(async_scheduling=False)


@pytest.mark.parametrize("is_async", [False, True])
def test_prompt_logprobs_are_those_of_one_rank(llm: LLM, one_rank: LLM, is_async: bool) -> None:
    """In chunks, of some requests and not of others, on both replicas; twice, with prefixes in the cache."""
    params = [dataclasses.replace(GREEDY, prompt_logprobs=num_top) for num_top in (0, 3, None, 2, 1)]
    expected = _prompt_logprobs(one_rank.generate(_prompts(), params))
    assert len(expected) > 3 * (4 + 63 + 129)
    llm.update_settings(ep_mode="auto", max_num_batched_tokens=64, async_scheduling=is_async)
    try:
        for data_parallel_rank in (None, 1):
            results = llm.generate(_prompts(), params, data_parallel_rank=data_parallel_rank)
            assert _prompt_logprobs(results) == pytest.approx(expected, abs=FP32_LOGITS_ATOL)
            assert _tokens(results) == _tokens(one_rank.generate(_prompts(), GREEDY))
    finally:
        llm.update_settings(async_scheduling=False)


def test_seeded_sampling_is_that_of_one_rank(llm: LLM, one_rank: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, n=3, max_tokens=10, ignore_eos=True)
    first, expected = (each.generate([_prompts()[1]], params)[0] for each in (llm, one_rank))
    assert isinstance(first, RequestOutput) and isinstance(expected, RequestOutput)
    assert [output.token_ids for output in first.outputs] == [output.token_ids for output in expected.outputs]


def test_grammars_are_followed_on_every_rank_as_on_one(llm: LLM, one_rank: LLM) -> None:
    """One step at a time and overlapped; a free request beside them."""
    forms = [{"regex": "[0-9]{3,9}-[a-c]{4}"}, {"choice": ("yes", "not at all")}, {"grammar": 'start: "(" start ")" | "x"'}]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=20, structured_outputs=StructuredOutputsParams(**form))
        for i, form in enumerate(forms)
    ]
    params += [GREEDY, dataclasses.replace(params[0], temperature=0.0, repetition_penalty=1.3)]
    expected = _ends(one_rank.generate(_prompts(), params))
    assert {end for _, end, _ in expected} == {"length", "stop"}
    for is_async in (True, False):
        llm.update_settings(ep_mode="auto", async_scheduling=is_async)
        assert _ends(llm.generate(_prompts(), params)) == expected


def test_an_idle_replica_takes_dummy_steps_and_counts_them(llm: LLM) -> None:
    before = llm.collect_stats()
    llm.generate([_prompts()[0]], GREEDY, data_parallel_rank=0)
    after = llm.collect_stats()
    assert [b.num_steps - a.num_steps for a, b in zip(before, after, strict=True)] == [NUM_TOKENS, 0]
    assert [b.num_dummy_steps - a.num_dummy_steps for a, b in zip(before, after, strict=True)] == [0, NUM_TOKENS]
    assert after[0].coordination_s > 0 and after[0].num_agreements == after[1].num_agreements
    ranks = [rank for replica in after for rank in replica.ranks]
    assert [rank.rank for rank in ranks] == [0, 1, 2, 3]
    assert all(rank.bytes_sent["ep"] and rank.bytes_sent["tp"] for rank in ranks)
    assert all(0 < rank.waited_s[axis] < 600 for rank in ranks for axis in ("ep", "tp"))


def test_expert_load_counts_every_token_once_a_layer(llm: LLM) -> None:
    def load() -> int:
        counts = [rank.tokens_per_expert for replica in llm.collect_stats() for rank in replica.ranks]
        return sum(sum(layer.tokens_per_expert) for layer in merge_local_counts(counts))

    before = load()
    llm.generate([[11, 12, 13]], GREEDY, data_parallel_rank=0)
    model = llm.model_config
    num_moe_layers = model.num_hidden_layers - model.first_k_dense_replace
    num_tokens = (
        3 + NUM_TOKENS - 1 + NUM_TOKENS
    )  # prompt, output but for the last token, and the other replica's dummy tokens
    assert load() - before == num_tokens * model.num_experts_per_tok * num_moe_layers


def test_leaving_a_stream_early_leaves_a_usable_engine(llm: LLM, alone: list[list[int]]) -> None:
    stream = llm.stream(_prompts()[2], dataclasses.replace(GREEDY, max_tokens=100))
    next(stream)
    stream.close()
    assert _tokens(llm.generate(_prompts(), GREEDY)) == alone


def test_a_stop_string_ends_a_request_in_its_replica(llm: LLM, one_rank: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, stop=("=",), ignore_eos=True)
    ours, theirs = (each.generate(["12 + 30"], params)[0] for each in (llm, one_rank))
    assert isinstance(ours, RequestOutput) and isinstance(theirs, RequestOutput)
    assert ours.outputs[0].finish_reason == "stop" and ours.outputs[0].text == theirs.outputs[0].text


def test_a_bad_prompt_fails_alone(llm: LLM, alone: list[list[int]]) -> None:
    results = llm.generate([_prompts()[0], "", [5] * 300], GREEDY, on_error="return")
    assert [isinstance(result, ValueError) for result in results] == [False, True, True]
    assert _tokens(results) == alone[:1]


def test_settings_that_cannot_work_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"data_parallel_rank \(2\) must be in \[0, dp_size = 2\)"):
        llm.generate([[1]], GREEDY, data_parallel_rank=2)
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        llm.update_settings(max_num_batched_tokens=3)
    with pytest.raises(RuntimeError, match="runs in 4 other processes"):
        _ = llm.engine


def test_a_killed_rank_ends_the_engine_with_its_name_and_leaves_no_process() -> None:
    llm = LLM(tp_size=2, **SETTINGS)  # type: ignore[arg-type]
    client = llm._client
    assert isinstance(client, ReplicasClient)
    stream = llm.stream([5, 6, 7], dataclasses.replace(GREEDY, max_tokens=200))
    next(stream)
    pids = client._link._processes.pids  # type: ignore[attr-defined]
    os.kill(pids[1], signal.SIGKILL)
    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 \(pid \d+, node 0\) was killed by SIGKILL"):
        list(stream)
    assert time.monotonic() - started_s < 35.0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids.values())
    with pytest.raises(RuntimeError, match="the engine is closed"):
        llm.generate([[5]], GREEDY)
    llm.close()


def test_a_setting_that_no_rank_can_have_is_a_user_error_and_leaves_no_process() -> None:
    with pytest.raises(ValueError, match="num_attention_heads.*--tp"):
        LLM(tp_size=3, **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot hold one request of max_model_len \(256\)"):
        LLM(tp_size=2, num_blocks=3, **SETTINGS)  # type: ignore[arg-type]
