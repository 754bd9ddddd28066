"""Nonsense gets a 4xx with an error object that names the field, and starts nothing."""

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROMPT = {"prompt": "a"}
BAD_COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": "a b" * 4000}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    (PROMPT | {"surprise": 1}, "surprise"),
    (PROMPT | {"temperature": -1}, "temperature"),
    (PROMPT | {"temperature": "0"}, "temperature"),
    (PROMPT | {"temperature": None}, "temperature"),
    (PROMPT | {"top_p": 0}, "top_p"),
    (PROMPT | {"top_p": 1.1}, "top_p"),
    (PROMPT | {"top_k": -2}, "top_k"),
    (PROMPT | {"top_k": 1.0}, "top_k"),
    (PROMPT | {"min_p": 2}, "min_p"),
    (PROMPT | {"n": 0}, "n"),
    (PROMPT | {"n": 129}, "n"),
    (PROMPT | {"n": 10**30}, "n"),
    (PROMPT | {"n": True}, "n"),
    (PROMPT | {"max_tokens": 0}, "max_tokens"),
    (PROMPT | {"max_tokens": "5"}, "max_tokens"),
    (PROMPT | {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    (PROMPT | {"stop": ""}, "stop"),
    (PROMPT | {"stop": ["a"] * 17}, "stop"),
    (PROMPT | {"stop": [1]}, "stop"),
    (PROMPT | {"stop": "a" * 257}, "stop"),
    (PROMPT | {"stop_token_ids": [10**6]}, None),
    (PROMPT | {"logit_bias": {"x": 1}}, None),
    (PROMPT | {"logit_bias": {"1": 101}}, "logit_bias"),
    (PROMPT | {"logit_bias": {"1000000": 1}}, None),
    (PROMPT | {"logprobs": 21}, "logprobs"),
    (PROMPT | {"logprobs": 1, "echo": True}, None),
    (PROMPT | {"best_of": 3}, None),
    (PROMPT | {"suffix": "b"}, "suffix"),
    (PROMPT | {"seed": -1}, "seed"),
    (PROMPT | {"stream_options": {"include_usage": True}}, None),
    (PROMPT | {"stream": "yes"}, "stream"),
    (PROMPT | {"request_id": "a b"}, "request_id"),
    (PROMPT | {"timeout": 0}, "timeout"),
    (PROMPT | {"priority": 1e99}, "priority"),
    (PROMPT | {"presence_penalty": 3}, "presence_penalty"),
    (PROMPT | {"repetition_penalty": 0}, "repetition_penalty"),
]
MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
BAD_CHATS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    (MESSAGES | {"max_tokens": 4, "max_completion_tokens": 5}, None),
    (MESSAGES | {"top_logprobs": 2}, None),
    (MESSAGES | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (MESSAGES | {"tools": [{"type": "function"}]}, "tools"),
    (MESSAGES | {"tool_choice": "auto"}, None),
    (MESSAGES | {"tool_choice": "required"}, "tool_choice"),
    (MESSAGES | {"response_format": {"type": "json_object"}}, None),
    (MESSAGES | {"chat_template_kwargs": {"tokenize": False}}, None),
    (MESSAGES | {"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}, None),
    (MESSAGES | {"reasoning_effort": "enormous"}, "reasoning_effort"),
]
CASES = [("/v1/completions", body, param) for body, param in BAD_COMPLETIONS]
CASES += [("/v1/chat/completions", body, param) for body, param in BAD_CHATS]
CASES += [
    ("/generate", {"prompt_token_ids": []}, "prompt_token_ids"),
    ("/generate", {"prompt_token_ids": "abc"}, "prompt_token_ids"),
    ("/tokenize", {}, None),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES["messages"]}, None),
    ("/detokenize", {"tokens": [10**6]}, "tokens"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "prompt",
    "messages",
    "temperature",
    "n",
    "stop",
    "logit_bias",
    "stream_options",
    "tools",
    "max_tokens",
    "seed",
]


def send(stand, path: str, content: bytes, **headers: str) -> httpx.Response:
    async def go() -> httpx.Response:
        async with stand.client() as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"} | headers)

    return asyncio.run(go())


def check_refusal(answer: httpx.Response, stand) -> dict:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert not stand.pool.running and not stand.service.board.num_requests
    return error


@pytest.mark.parametrize(("path", "body", "param"), CASES)
def test_bad_bodies(stand, path: str, body: dict, param: str | None) -> None:
    content = json.dumps(body).encode()
    error = check_refusal(send(stand, path, content), stand)
    if param is not None:
        assert error["param"] is not None and error["param"].split(".")[0] == param


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000])
def test_bodies_that_are_no_object(stand, content: bytes) -> None:
    check_refusal(send(stand, "/v1/completions", content), stand)


def test_unknown_model(stand) -> None:
    answer = send(stand, "/v1/completions", b'{"prompt": "a", "model": "gpt-9"}')
    assert answer.status_code == 404 and check_refusal(answer, stand)["code"] == "model_not_found"


def test_too_long_a_prompt_says_both_numbers(stand) -> None:
    error = check_refusal(send(stand, "/v1/completions", json.dumps({"prompt": [5] * 3000}).encode()), stand)
    assert error["code"] == "context_length_exceeded" and "3000" in error["message"] and "2048" in error["message"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, max_size=4))
def test_generated_bodies_never_break_the_server(stand, body: dict) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = send(stand, path, json.dumps(body).encode())
        assert answer.status_code == 200 or check_refusal(answer, stand)
