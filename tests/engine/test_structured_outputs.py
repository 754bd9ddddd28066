"""Outputs match their grammars with the real engine, whatever else is asked, scheduled or recorded."""

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest

from argosy import LLM, RequestOutput, SamplingParams
from argosy.config import EngineConfig
from argosy.engine.generation import Result
from argosy.engine.model_directory import resolve_model_directory
from argosy.engine.replica_loop import build_request
from argosy.engine.replica_messages import AddRequest
from argosy.engine.tokenizer import Tokenizer
from argosy.messages import FinishReason, TokenDelta
from argosy.sampling_params import StructuredOutputsParams

SETTINGS: dict[str, object] = {"num_threads": 1, "max_model_len": 256, "block_size": 16, "max_num_seqs": 8}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
BY_SCHEMA = StructuredOutputsParams(json=SCHEMA)
BY_REGEX = StructuredOutputsParams(regex=r"[0-9]{3}-[a-c]{2,9}")
BY_CHOICE = StructuredOutputsParams(choice=("yes", "no", "not at all"))
BY_GRAMMAR = StructuredOutputsParams(grammar='start: "(" start ")" | "x" | "y"\n')
TOKENIZER = Tokenizer.from_directory(resolve_model_directory("argosy-tiny"))
# An untrained writer of JSON would indent without end.
NO_NEW_LINES = {i: -100.0 for i, token in enumerate(TOKENIZER.byte_table(skip_special_tokens=False)) if b"\n" in token}
DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=100, structured_outputs=BY_SCHEMA, logit_bias=NO_NEW_LINES)
PROMPTS = ["17 + 25 = ?", "a", "法国的首都是哪里？", "b c d", "e", "f g"]


def settings_of_all() -> list[SamplingParams]:
    return [
        DRAWN,
        SamplingParams(temperature=0.0, max_tokens=60, structured_outputs=BY_REGEX, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=30),  # free, beside the others
        SamplingParams(
            temperature=0.9, seed=1, top_p=0.9, top_k=20, repetition_penalty=1.3, structured_outputs=BY_CHOICE
        ),
        SamplingParams(temperature=1.0, seed=3, max_tokens=100, structured_outputs=BY_GRAMMAR, ignore_eos=True),
        dataclasses.replace(DRAWN, seed=9, min_tokens=30),
    ]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM.from_config(EngineConfig(device="cpu", async_scheduling=False, **SETTINGS)) as llm:  # type: ignore[arg-type]
        yield llm


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[RequestOutput]:
    return whole(llm.generate(PROMPTS, settings_of_all()))


def whole(results: list[Result]) -> list[RequestOutput]:
    assert all(isinstance(result, RequestOutput) for result in results)
    return results  # type: ignore[return-value]


def facts(results: list[RequestOutput]) -> list[object]:
    return [(result.outputs[0].token_ids, result.outputs[0].finish_reason) for result in results]


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert len(person["name"]) <= 6 and 0 <= person["age"] <= 99
    assert len(person["tags"]) <= 2 and set(person["tags"]) <= {"a", "bc"}


def test_every_output_matches_and_ends(expected: list[RequestOutput]) -> None:
    texts = [result.outputs[0].text for result in expected]
    for i in (0, 5):
        check_person(texts[i])
    assert re.fullmatch(r"[0-9]{3}-[a-c]{2,9}", texts[1])
    assert texts[3] in ("yes", "no", "not at all")
    assert re.fullmatch(r"\(*[xy]\)*", texts[4]) and texts[4].count("(") == texts[4].count(")")
    assert {result.outputs[0].finish_reason for i, result in enumerate(expected) if i != 2} == {"stop"}


def test_reported_logprobs_are_those_of_the_model(llm: LLM, expected: list[RequestOutput]) -> None:
    """Before the mask, as they are before penalties: a forced token may be an unlikely one."""
    entries = expected[1].outputs[0].logprobs
    assert entries is not None and any(entry.rank > 1 for entry in entries)
    free = whole(llm.generate(PROMPTS[1], dataclasses.replace(settings_of_all()[1], structured_outputs=None)))
    free_entries = free[0].outputs[0].logprobs
    assert free_entries is not None and free_entries[0].top_token_ids == entries[0].top_token_ids


def test_a_free_request_beside_grammars_is_what_it_is_alone(llm: LLM, expected: list[RequestOutput]) -> None:
    assert facts(whole(llm.generate(PROMPTS[2], settings_of_all()[2]))) == facts(expected[2:3])


@pytest.mark.parametrize(
    "changes",
    [
        {"async_scheduling": True},
        {"async_scheduling": True, "num_blocks": 7, "max_model_len": 96},
        {"emulate_graphs": True},
    ],
    ids=["overlapped", "overlapped and preempted", "recorded"],
)
def test_tokens_do_not_depend_on_how_steps_are_run(expected: list[RequestOutput], changes: dict) -> None:
    config = EngineConfig(device="cpu", **{**SETTINGS, "async_scheduling": False, **changes})
    with LLM.from_config(config) as llm:
        for _ in range(2):  # the second time grammars and rows have been used before
            assert facts(whole(llm.generate(PROMPTS, settings_of_all()))) == facts(expected)
        assert llm.engine.scheduler.num_preemptions > 0 or "num_blocks" not in changes
        assert llm.engine.runner.num_replays > 0 or "emulate_graphs" not in changes


def test_a_run_split_anywhere_goes_on_in_its_grammar(llm: LLM, expected: list[RequestOutput]) -> None:
    tokens, prompt = expected[0].outputs[0].token_ids, expected[0].prompt_token_ids
    splits = range(1, len(tokens), 9)
    requests = [AddRequest(f"part {i}", prompt, DRAWN, output_token_ids=tokens[:i]) for i in splits]
    for i, deltas in zip(splits, run(llm, requests), strict=True):
        assert [token for delta in deltas for token in delta.new_token_ids] == tokens[i:]


def run(llm: LLM, requests: list[AddRequest]) -> list[list[TokenDelta]]:
    core = llm.engine
    deltas: dict[str, list[TokenDelta]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.add(build_request(request, llm.model_config.eos_token_ids))
    while core.has_unfinished():
        for delta in core.step():
            deltas[delta.request_id].append(delta)
    return list(deltas.values())


def test_reasoning_is_free_and_the_answer_is_not(llm: LLM) -> None:
    """The end of reasoning is made likely, so that it comes soon."""
    end_id = llm.tokenizer.encode_mark("</think>")
    params = SamplingParams(
        temperature=1.0, seed=4, max_tokens=200, structured_outputs=BY_SCHEMA, logit_bias={**NO_NEW_LINES, end_id: 9.0}
    )
    for seed in range(2):
        result = whole(
            llm.chat(
                [{"role": "user", "content": "17 + 25 = ?"}], dataclasses.replace(params, seed=seed), thinking=True
            )
        )[0]
        reasoning, mark, answer = result.outputs[0].text.partition("</think>")
        assert mark and result.outputs[0].finish_reason == "stop"
        check_person(answer)
    early = dataclasses.replace(params, logit_bias={llm.tokenizer.eos_token_id: 100.0}, max_tokens=8)
    result = whole(llm.chat([{"role": "user", "content": "a"}], early, thinking=True))[0]
    assert result.outputs[0].finish_reason == "length"  # the end cannot come before the grammar


def test_the_end_of_a_grammar_is_the_end(llm: LLM) -> None:
    """Whatever min_tokens and ignore_eos say; before it they hold."""
    params = SamplingParams(temperature=0.0, max_tokens=50, min_tokens=20, ignore_eos=True)
    for structured, text in (
        (StructuredOutputsParams(choice=("abc",)), "abc"),
        (StructuredOutputsParams(regex="b{9,30}"), "b" * 30),
    ):
        result = whole(llm.generate("a", dataclasses.replace(params, structured_outputs=structured)))[0]
        assert (result.outputs[0].text, result.outputs[0].finish_reason) == (text, "stop")


def test_several_completions_and_a_stop_string(llm: LLM) -> None:
    result = whole(llm.generate("a", dataclasses.replace(DRAWN, n=3)))[0]
    for output in result.outputs:
        check_person(output.text)
    assert len({output.text for output in result.outputs}) == 3
    stopped = whole(llm.generate("a", dataclasses.replace(DRAWN, stop=("age",))))[0]
    assert re.fullmatch(r'\{\s*"name"\s*:\s*".*"\s*,\s*"', stopped.outputs[0].text, re.DOTALL)


def test_a_bad_grammar_is_refused_with_its_prompt(llm: LLM) -> None:
    bad = dataclasses.replace(DRAWN, structured_outputs=StructuredOutputsParams(regex="(("))
    with pytest.raises(ValueError, match=r"prompt 1: structured_outputs cannot be compiled: .*unclosed group"):
        llm.generate(["a", "b"], [DRAWN, bad])
    results = llm.generate(["a", "b"], [DRAWN, bad], on_error="return")
    assert isinstance(results[0], RequestOutput) and isinstance(results[1], ValueError)


def test_what_an_engine_cannot_follow_ends_with_an_error(llm: LLM) -> None:
    """Nobody sends it such grammars, who has checked them; it lives on, and says what happened."""
    bad = dataclasses.replace(DRAWN, structured_outputs=StructuredOutputsParams(regex="((a{1000}){1000}){1000}"))
    first, second = run(llm, [AddRequest("bad", [5], bad), AddRequest("good", [5], DRAWN)])
    assert first[-1].finish_reason is FinishReason.ERROR and len(first) < 5
    assert re.search("the grammar cannot be followed: lexer error", str(first[-1].stop_reason))
    assert second[-1].finish_reason is FinishReason.STOP
    llm.engine.scheduler.check_integrity()
