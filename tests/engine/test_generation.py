"""``LLM`` on the built-in model: tokens do not depend on company or cuts; bad input fails alone."""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from argosy import LLM, EngineConfig, RequestOutput, SamplingParams
from argosy.engine.generation import Result
from argosy.validation.probe import ModelProbe
from tests.helpers.tolerance import FP32_LOGITS_ATOL

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def _build(device: str, **settings: object) -> LLM:
    """float32 everywhere: identity of tokens is the claim."""
    fixed = {"device": device, "dtype": "float32", "num_threads": 1, "max_model_len": 512}
    return LLM(**{**fixed, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llm(device: str) -> LLM:
    return _build(device)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.has_unfinished()
    llm.engine.scheduler.check_integrity()


def _prompts() -> list[list[int]]:
    """Lengths around block (64) and index_topk (64) borders; two share a long prefix."""
    generator = torch.Generator().manual_seed(5)
    lengths = (1, 5, 63, 64, 65, 130, 200, 201)
    prompts = [torch.randint(10, 3000, (n,), generator=generator).tolist() for n in lengths]
    prompts[-1] = prompts[-2] + [77]
    return prompts


def _tokens(results: list[Result]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in results if isinstance(output, RequestOutput)]


@pytest.fixture(scope="module")
def alone(device: str) -> list[list[int]]:
    """Every prompt by itself, whole, in an engine without prefix caching: what everything else must equal."""
    plain = _build(device, enable_prefix_caching=False)
    return [_tokens(plain.generate([prompt], GREEDY))[0] for prompt in _prompts()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 64},
        {"max_num_batched_tokens": 17, "max_num_seqs": 5},
        {"block_size": 16, "enable_prefix_caching": False},
        {"max_num_seqs": 2},
        {"max_num_seqs": 1},
    ],
    ids=str,
)
def test_greedy_tokens_do_not_depend_on_company_chunks_or_blocks(
    device: str, settings: dict[str, object], alone: list[list[int]]
) -> None:
    assert _tokens(_build(device, **settings).generate(_prompts(), GREEDY)) == alone


def test_preemption_changes_no_token(device: str, alone: list[list[int]]) -> None:
    llm = _build(device, block_size=16, num_blocks=33)  # one request of max_model_len, or a few of ours
    params = dataclasses.replace(GREEDY, max_tokens=100)
    results = _tokens(llm.generate(_prompts(), params))
    assert llm.engine.scheduler.num_preemptions > 0
    assert [tokens[:24] for tokens in results] == alone
    llm.engine.scheduler.check_integrity()


def test_a_prefix_hit_saves_work_and_changes_no_token(device: str, alone: list[list[int]]) -> None:
    llm = _build(device)
    first, again = (llm.generate([_prompts()[-1]], GREEDY)[0] for _ in range(2))
    assert isinstance(first, RequestOutput) and isinstance(again, RequestOutput)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 192)
    assert first.outputs[0].token_ids == again.outputs[0].token_ids == alone[-1]


def test_seeded_sampling_does_not_depend_on_company(device: str, llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=20, ignore_eos=True)
    (single,) = _tokens(llm.generate([_prompts()[3]], params))
    crowd = _tokens(_build(device, max_num_batched_tokens=64).generate(_prompts(), params))
    assert crowd[3] == single
    assert len({tuple(tokens) for tokens in crowd}) > 1


def test_results_come_in_input_order_for_every_form_of_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode_prompt("12 + 30 =")
    lengths = [7, 3, 11, 5]
    prompts = ["12 + 30 =", ids, {"prompt": "12 + 30 ="}, {"prompt_token_ids": ids}]
    results = llm.generate(prompts, [dataclasses.replace(GREEDY, max_tokens=n) for n in lengths])
    tokens = _tokens(results)
    assert [len(each) for each in tokens] == lengths
    assert all(each == tokens[2][: len(each)] for each in tokens)
    assert [output.prompt for output in results if isinstance(output, RequestOutput)] == ["12 + 30 =", None] * 2


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    assert _tokens(llm.generate("12 + 30 =", GREEDY)) == _tokens(llm.generate(["12 + 30 ="], GREEDY))
    assert _tokens(llm.generate([5, 6, 7], GREEDY)) == _tokens(llm.generate([[5, 6, 7]], GREEDY))
    assert llm.generate([], GREEDY) == []


def test_logprobs_are_those_of_the_model(llm: LLM) -> None:
    prompt = _prompts()[4]
    (result,) = llm.generate([prompt], dataclasses.replace(GREEDY, logprobs=3))
    assert isinstance(result, RequestOutput)
    output = result.outputs[0]
    runner = llm.engine.runner
    probe = ModelProbe(runner.model, llm.model_config, runner.rotary)
    (logits,) = probe.logits([prompt + output.token_ids], 600)
    expected = logits[len(prompt) - 1 : -1, : llm.vocab_size].log_softmax(-1)
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    for entry, token_id, row in zip(output.logprobs, output.token_ids, expected, strict=True):
        assert entry.token_id == token_id == entry.top_token_ids[0] and entry.rank == 1
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=10 * FP32_LOGITS_ATOL)
        assert entry.top_logprobs == pytest.approx(row.topk(3)[0].tolist(), abs=10 * FP32_LOGITS_ATOL)
    assert output.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in output.logprobs))


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (whole,) = llm.generate(["12 + 30 ="], dataclasses.replace(GREEDY, max_tokens=40))
    assert isinstance(whole, RequestOutput)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    (cut,) = llm.generate(["12 + 30 ="], dataclasses.replace(GREEDY, max_tokens=40, stop=(stop,)))
    assert isinstance(cut, RequestOutput)
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert len(cut.outputs[0].token_ids) < 40


def test_stop_token_and_length_are_reported(llm: LLM, alone: list[list[int]]) -> None:
    stop_id = alone[5][7]
    first = alone[5].index(stop_id)
    results = llm.generate([_prompts()[5]], dataclasses.replace(GREEDY, stop_token_ids=(stop_id,)))
    assert isinstance(results[0], RequestOutput)
    output = results[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (alone[5][: first + 1], "stop", stop_id)
    (long,) = llm.generate([_prompts()[5]], dataclasses.replace(GREEDY, max_tokens=None))
    assert isinstance(long, RequestOutput)
    assert len(long.outputs[0].token_ids) == 512 - 130 and long.outputs[0].finish_reason == "length"


def test_n_completions_differ_and_are_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    first, again = (llm.generate([_prompts()[2]], params)[0] for _ in range(2))
    assert isinstance(first, RequestOutput) and isinstance(again, RequestOutput)
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    assert [output.token_ids for output in first.outputs] == [output.token_ids for output in again.outputs]


def test_stream_grows_to_the_offline_answer(llm: LLM) -> None:
    (whole,) = llm.generate(["12 + 30 ="], GREEDY)
    assert isinstance(whole, RequestOutput)
    parts = list(llm.stream("12 + 30 =", GREEDY))
    texts = [part.outputs[0].text for part in parts]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert len(parts) > 5 and parts[-1].finished and parts[-1].outputs[0].token_ids == whole.outputs[0].token_ids


def test_leaving_a_stream_early_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("12 + 30 =", GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished()


def test_an_interrupted_call_leaves_a_usable_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = llm.engine.runner.start, []

    def interrupted(batch: object, **settings: object) -> object:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return start(batch, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.engine.runner, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(_prompts(), GREEDY)
    assert not llm.engine.has_unfinished()
    llm.engine.scheduler.check_integrity()
    assert len(_tokens(llm.generate(_prompts(), GREEDY))) == 8


BAD_PROMPTS = [
    ("", "empty"),
    ([], "empty"),
    ([5] * 512, "512 tokens, but max_model_len is 512"),
    ([5, 4000], r"prompt_token_ids\[1\]"),
    ([5, -1], r"prompt_token_ids\[1\]"),
    ([5, 1.5], r"prompt_token_ids\[1\]"),
    ({"prompt": "a", "prompt_token_ids": [1]}, "exactly one"),
    ({"prompts": "a"}, "exactly one"),
    ({"prompt": 3}, "must be a str"),
    (3.5, "must be a string, a list"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_bad_prompt_fails_alone_or_refuses_the_call(llm: LLM, prompt: object, message: str) -> None:
    good = _prompts()[1]
    results = llm.generate([good, prompt, good], GREEDY, on_error="return")  # type: ignore[list-item]
    assert isinstance(results[1], ValueError)
    assert isinstance(results[0], RequestOutput) and isinstance(results[2], RequestOutput)
    with pytest.raises(ValueError, match=message):
        llm.generate([good, prompt, good], GREEDY)  # type: ignore[list-item]


def test_sampling_ids_beyond_the_tokenizer_are_refused(llm: LLM) -> None:
    for params in (SamplingParams(stop_token_ids=(10**6,)), SamplingParams(logit_bias={10**6: 1.0})):
        with pytest.raises(ValueError, match="1000000"):
            llm.generate(["a"], params)
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY])


def test_chat_takes_one_conversation_or_many_and_a_bad_one_fails_alone(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "2 + 2 = ?"}]
    (one,) = llm.chat(conversation, GREEDY)
    results = llm.chat([conversation, [{"role": "nobody", "content": ""}], conversation], GREEDY, on_error="return")
    assert isinstance(results[1], ValueError)
    assert _tokens([one]) * 2 == _tokens([results[0], results[2]])
    with pytest.raises(ValueError, match="conversation 1: .*nobody"):
        llm.chat([conversation, [{"role": "nobody", "content": ""}]], GREEDY)


def test_llm_takes_every_engine_setting_with_the_same_default() -> None:
    parameters = dict(inspect.signature(LLM.__init__).parameters)
    parameters.pop("self")
    assert {name: each.default for name, each in parameters.items()} == {
        field.name: field.default for field in dataclasses.fields(EngineConfig)
    }


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model: '/no/such/place'"):
        _build("cpu", model="/no/such/place")
    with pytest.raises(ValueError, match=r"max_model_len \(99999\) must be in \[2, 4096\]"):
        _build("cpu", max_model_len=99999)
    with pytest.raises(ValueError, match=r"lower --max-model-len to 192 or less"):
        _build("cpu", num_blocks=4)
    with pytest.raises(ValueError, match="config.json"):
        _build("cpu", model=str(tmp_path))
