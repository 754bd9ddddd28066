"""Log probabilities of prompts: those of one forward pass over the prompt alone, however its computation was cut up."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from argosy import LLM, RequestOutput, SamplingParams
from argosy.assets import builtin_model_directory
from argosy.config import EngineConfig
from argosy.engine.generation import Result
from argosy.engine.replica_loop import build_request
from argosy.engine.replica_messages import AddRequest
from argosy.messages import TokenDelta
from argosy.runner import prompt_logprobs
from tests.helpers.models import load_model
from tests.helpers.tolerance import FP32_LOGITS_ATOL

SETTINGS: dict[str, object] = {"dtype": "float32", "num_threads": 1, "max_model_len": 256, "block_size": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
ASKING = dataclasses.replace(GREEDY, prompt_logprobs=3)
LENGTHS = (1, 2, 5, 63, 64, 130, 100)
NUM_TOP = (3, 0, 20, 1, 3, None, 2)  # by prompt; None: not asked for


def build(device: str, **settings: object) -> LLM:
    """``emulate_graphs``: a card records steps unless it is told not to."""
    if device == "cuda" and "emulate_graphs" in settings:
        settings["enforce_eager"] = not settings.pop("emulate_graphs")
    return LLM.from_config(EngineConfig(device=device, **{**SETTINGS, **settings}))  # type: ignore[arg-type]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in LENGTHS]


def params_of_all() -> list[SamplingParams]:
    return [dataclasses.replace(GREEDY, prompt_logprobs=num_top) for num_top in NUM_TOP]


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    with build(device) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(device: str, llm: LLM) -> list[torch.Tensor]:
    """[T, V] of each prompt: one forward pass without an engine, and float32."""
    probe = load_model(builtin_model_directory("argosy-tiny"), device=device).probe
    num_valid = llm.tokenizer.vocab_size
    return [probe.logits([prompt], len(prompt))[0][:, :num_valid].float().log_softmax(1).cpu() for prompt in prompts()]


def check(result: Result, expected: torch.Tensor, num_top: int | None) -> None:
    assert isinstance(result, RequestOutput)
    if num_top is None:
        assert result.prompt_logprobs is None
        return
    prompt = result.prompt_token_ids
    assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(result.prompt_logprobs[1:], start=1):
        scores = expected[position - 1]
        assert entry is not None and entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(scores[entry.token_id]), abs=FP32_LOGITS_ATOL)
        least, most = (int((scores > entry.logprob + shift).sum()) for shift in (FP32_LOGITS_ATOL, -FP32_LOGITS_ATOL))
        assert least < entry.rank <= most + 1
        assert len(entry.top_token_ids) == len(entry.top_logprobs) == num_top
        assert entry.top_logprobs == pytest.approx(scores.topk(num_top).values.tolist(), abs=FP32_LOGITS_ATOL)
        assert entry.top_logprobs == pytest.approx(scores[entry.top_token_ids].tolist(), abs=FP32_LOGITS_ATOL)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 17, "max_num_seqs": 4},
        {"async_scheduling": True, "max_num_batched_tokens": 40, "max_num_seqs": 8},
        {
            "num_blocks": 12,
            "max_model_len": 160,
            "async_scheduling": True,
            "max_num_batched_tokens": 40,
            "max_num_seqs": 8,
        },
        {"emulate_graphs": True, "async_scheduling": True, "max_num_batched_tokens": 30, "max_num_seqs": 8},
    ],
    ids=str,
)
def test_they_are_those_of_one_forward_pass(
    device: str, llm: LLM, expected: list[torch.Tensor], settings: dict[str, object]
) -> None:
    """Requests that ask for nothing run beside them, and the tokens are those that nobody asked about."""
    tokens = [result.outputs[0].token_ids for result in llm.generate(prompts(), GREEDY)]  # type: ignore[union-attr]
    params = params_of_all()
    if "num_blocks" in settings:  # long answers, so that the cache runs over while prompts are computed
        params = [dataclasses.replace(each, max_tokens=20) for each in params]
    with build(device, **settings) as other:
        results = other.generate(prompts(), params)
        for result, scores, num_top, ids in zip(results, expected, NUM_TOP, tokens, strict=True):
            check(result, scores, num_top)
            assert isinstance(result, RequestOutput) and result.outputs[0].token_ids[:6] == ids
        scheduler = other.engine.scheduler
        scheduler.check_integrity()
        assert (scheduler.num_preemptions > 0) == ("num_blocks" in settings)


@pytest.mark.parametrize("emulate_graphs", [False, True])
def test_one_token_a_step(device: str, expected: list[torch.Tensor], emulate_graphs: bool) -> None:
    """Steps that look like decodes, and are replayed as such where there are recordings."""
    with build(device, max_num_batched_tokens=1, max_num_seqs=1, emulate_graphs=emulate_graphs) as llm:
        first = next(llm.stream(prompts()[3], ASKING))
        check(first, expected[3], 3)
        assert len(first.outputs[0].token_ids) == 1
        assert (llm.engine.runner.num_replays > 60) == emulate_graphs


def test_a_cached_prefix_is_not_used_for_positions_that_are_asked_about(
    device: str, expected: list[torch.Tensor]
) -> None:
    prompt, scores = prompts()[5], expected[5]
    with build(device) as llm:
        cached = []
        for params in (GREEDY, ASKING, GREEDY):
            (result,) = llm.generate([prompt], params)
            assert isinstance(result, RequestOutput)
            check(result, scores, params.prompt_logprobs)
            cached.append(result.num_cached_tokens)
        assert cached == [0, 0, 128]


def test_a_preempted_prompt_goes_on_where_its_log_probabilities_end(device: str, expected: list[torch.Tensor]) -> None:
    """What was known before is not computed again, nor told twice."""
    prompt, scores = prompts()[5], expected[5]
    with build(device, max_num_batched_tokens=40, max_num_seqs=8, async_scheduling=False) as llm:
        core = llm.engine
        core.add(build_request(AddRequest("a", prompt, ASKING), ()))
        core.step()
        core.step()
        core.scheduler.cancel_steps()
        deltas: list[TokenDelta] = []
        while core.has_unfinished():
            deltas += core.step()
        assert core.scheduler.num_scheduled_tokens == 80 + (130 - 80) + 5  # 80 tokens are five whole blocks
        assert [delta.prompt_logprobs is None for delta in deltas] == [False] + [True] * 5
        assert deltas[0].prompt_logprobs is not None
        ours = [entry.logprob for entry in deltas[0].prompt_logprobs]
        assert ours == pytest.approx([float(scores[i - 1, prompt[i]]) for i in range(1, 130)], abs=FP32_LOGITS_ATOL)


def test_a_request_that_goes_on_behind_told_tokens_does_not_tell_them_again(llm: LLM) -> None:
    core, prompt = llm.engine, prompts()[3]
    deltas: list[TokenDelta] = []
    for name, told in (("whole", []), ("rest", [7, 8])):
        core.add(build_request(AddRequest(name, prompt, ASKING, output_token_ids=told), ()))
        while core.has_unfinished():
            deltas += core.step()
    told = {delta.request_id: delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None}
    assert list(told) == ["whole"] and len(told["whole"]) == 62


def test_logits_are_made_in_pieces_and_only_for_who_asks(
    llm: LLM, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llm.engine.runner.model
    real, sizes = model.compute_logits, []

    def counted(hidden_states: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden_states.shape[0])
        return real(hidden_states)

    monkeypatch.setattr(model, "compute_logits", counted)
    monkeypatch.setattr(prompt_logprobs, "MAX_LINES", 48)
    prompt, scores = prompts()[5], expected[5]
    check(llm.generate([prompt], dataclasses.replace(ASKING, max_tokens=1))[0], scores, 3)
    assert sizes == [48, 48, 33, 1]
    sizes.clear()
    check(llm.generate([prompt], dataclasses.replace(GREEDY, max_tokens=1))[0], scores, None)
    assert sizes == [1]


def test_completions_of_one_prompt_share_them(llm: LLM, expected: list[torch.Tensor]) -> None:
    params = dataclasses.replace(ASKING, n=3, temperature=1.0, seed=4)
    (result,) = llm.generate([prompts()[3]], params)
    check(result, expected[3], 3)
    outputs = list(llm.stream(prompts()[3], params))
    assert all(output.prompt_logprobs == outputs[-1].prompt_logprobs for output in outputs)
    check(outputs[-1], expected[3], 3)


@pytest.mark.parametrize("value", [-1, 21, True, 1.0])
def test_what_cannot_be_asked_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"prompt_logprobs must be an integer in \[0, 20\]"):
        SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]
