"""The routes that generate, over a pool that answers what the test says."""

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from argosy.models.deepseek.encoding import (
    CALLS_END,
    CALLS_START,
    INVOKE_END,
    INVOKE_START,
    PARAMETER_END,
    PARAMETER_START,
)

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "6 * 7?"}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]


def read_events(text: str) -> list[dict]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def post(stand, path: str, body: dict, **headers: str) -> httpx.Response:
    async def go() -> httpx.Response:
        async with stand.client() as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(go())


def test_completion(stand) -> None:
    answer = post(stand, "/v1/completions", {"prompt": "6 * 7?"}).json()
    choice = answer["choices"][0]
    assert answer["object"] == "text_completion" and answer["model"] == "argosy-tiny"
    assert (choice["text"], choice["finish_reason"]) == ("It is 42.", "stop")
    num_prompt = len(stand.tokenizer.encode_prompt("6 * 7?"))
    num_output = len(stand.tokenizer.encode("It is 42.")) + 1
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, num_output)
    assert usage["total_tokens"] == num_prompt + num_output


def test_prompts_of_every_form(stand) -> None:
    ids = stand.tokenizer.encode_prompt("6 * 7?")
    for prompt, num_choices in (("a", 1), (["a", "b"], 2), (ids, 1), ([ids, ids, ids], 3)):
        answer = post(stand, "/v1/completions", {"prompt": prompt, "n": 2}).json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_choices))


def test_echo(stand) -> None:
    answer = post(stand, "/v1/completions", {"prompt": ["6 * 7? ", "x "], "echo": True, "n": 2}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["6 * 7? It is 42."] * 2 + ["x It is 42."] * 2


def test_completion_logprobs(stand) -> None:
    answer = post(stand, "/v1/completions", {"prompt": "a", "logprobs": 2}).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"][:-1]) == "It is 42."
    assert logprobs["token_logprobs"] == [-0.5] * len(logprobs["tokens"])
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.5
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0 and [b - a for a, b in zip(offsets, offsets[1:], strict=False)] == [
        len(token) for token in logprobs["tokens"][:-1]
    ]


def test_streamed_completion_joins_to_the_whole_one(stand) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "echo": False}
    whole = post(stand, "/v1/completions", body).json()
    streamed = post(stand, "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = read_events(streamed.text)
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    for choice in whole["choices"]:
        mine = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [item for c in mine for item in c["logprobs"][name]] == choice["logprobs"][name]


def test_chat(stand) -> None:
    answer = post(stand, CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "It is 42."}
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries[:-1]).decode() == "It is 42."
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert choice["finish_reason"] == "stop"


def test_streamed_chat_joins_to_the_whole_one(build_stand: Callable) -> None:
    stand = build_stand("Let me see, 6 * 7.</think>It is 42.")
    body = {"messages": MESSAGES, "chat_template_kwargs": {"thinking": True}, "n": 2}
    whole = post(stand, CHAT, body).json()
    events = read_events(post(stand, CHAT, body | {"stream": True}).text)
    assert [c["delta"]["role"] for c in events[0]["choices"]] == ["assistant"] * 2
    for choice in whole["choices"]:
        message = choice["message"]
        assert message["reasoning_content"] == message["reasoning"] == "Let me see, 6 * 7."
        assert message["content"] == "It is 42."
        deltas = [c["delta"] for event in events for c in event["choices"] if c["index"] == choice["index"]]
        for name in ("reasoning_content", "content"):
            assert "".join(delta.get(name) or "" for delta in deltas) == message[name]


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(build_stand: Callable, stream: bool) -> None:
    parameter = f'{PARAMETER_START} name="key" string="true">a "b"{PARAMETER_END}'
    call = f'{INVOKE_START} name="look_up">\n{parameter}\n{INVOKE_END}\n'
    stand = build_stand(f"I will look.\n\n{CALLS_START}\n{call}{call}{CALLS_END}")
    answer = post(stand, CHAT, {"messages": MESSAGES, "tools": TOOLS, "stream": stream})
    if stream:
        choices = [choice for event in read_events(answer.text) for choice in event["choices"]]
        content = "".join(choice["delta"].get("content") or "" for choice in choices)
        calls = [each for choice in choices for each in choice["delta"].get("tool_calls", [])]
        assert [each["index"] for each in calls] == [0, 1]
        reason = choices[-1]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        content, calls, reason = choice["message"]["content"], choice["message"]["tool_calls"], choice["finish_reason"]
    assert content == "I will look." and reason == "tool_calls"
    assert [each["function"]["name"] for each in calls] == ["look_up"] * 2
    assert json.loads(calls[0]["function"]["arguments"]) == {"key": 'a "b"'}
    assert len({each["id"] for each in calls}) == 2


ONE_CALL = {"messages": MESSAGES, "tools": TOOLS, "parallel_tool_calls": False}


def two_calls() -> str:
    parameters = [f'{PARAMETER_START} name="key" string="false">{i}{PARAMETER_END}' for i in range(2)]
    calls = "".join(f'{INVOKE_START} name="look_up">\n{each}\n{INVOKE_END}\n' for each in parameters)
    return f"I will look.\n\n{CALLS_START}\n{calls}{CALLS_END}"


@pytest.mark.parametrize("fields", [{}, {"min_tokens": 900, "ignore_eos": True, "n": 2, "tool_choice": "auto"}])
def test_without_parallel_calls_an_answer_ends_behind_its_first(build_stand: Callable, fields: dict) -> None:
    stand = build_stand(two_calls())
    options = {"return_token_ids": True, "logprobs": True} | fields
    whole = post(stand, CHAT, ONE_CALL | options).json()
    text = two_calls().partition(f"{INVOKE_END}\n")[0] + f"{INVOKE_END}\n"
    events = read_events(post(stand, CHAT, ONE_CALL | options | {"stream": True}).text)
    for choice in whole["choices"]:
        message, reason = choice["message"], choice["finish_reason"]
        assert (message["content"], reason, choice["stop_reason"]) == ("I will look.", "tool_calls", None)
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"key": 0}
        assert stand.tokenizer.decode(choice["token_ids"], skip_special_tokens=False) == text
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
        mine = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        (streamed,) = [each for c in mine for each in c["delta"].get("tool_calls", [])]
        assert streamed["function"] == call["function"] and streamed["index"] == 0
        assert "".join(c["delta"].get("content") or "" for c in mine) == message["content"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["tool_calls"]
        assert [token_id for c in mine for token_id in c.get("token_ids", [])] == choice["token_ids"]
    assert len(stand.pool.finished) == 2 * len(whole["choices"]) and not stand.pool.running


@pytest.mark.parametrize("fields", [{"parallel_tool_calls": True}, {"tool_choice": "none"}, {"tools": []}])
def test_answers_that_may_go_on_do(build_stand: Callable, fields: dict) -> None:
    stand = build_stand(two_calls())
    choice = post(stand, CHAT, ONE_CALL | fields).json()["choices"][0]
    assert len(choice["message"].get("tool_calls", [])) == (2 if fields.get("parallel_tool_calls") else 0)
    assert not stand.pool.finished


def test_calls_that_are_reasoned_about_end_nothing(build_stand: Callable) -> None:
    call = two_calls().partition(f"{INVOKE_END}\n")[0] + f"{INVOKE_END}\n"
    stand = build_stand(f"{call}</think>Let me not.")
    thinking = {"chat_template_kwargs": {"thinking": True}}
    choice = post(stand, CHAT, ONE_CALL | thinking).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == call and choice["message"]["content"] == "Let me not."
    assert choice["finish_reason"] == "stop" and not stand.pool.finished


def test_generate_takes_and_gives_tokens(stand) -> None:
    ids = stand.tokenizer.encode("abc")
    answer = post(stand, "/generate", {"prompt_token_ids": ids, "request_id": "mine"}).json()
    assert answer["request_id"] == "mine"
    assert answer["outputs"][0]["token_ids"] == [*stand.tokenizer.encode("It is 42."), stand.tokenizer.eos_token_id]


def test_stop_string_ends_the_engine_request(stand) -> None:
    answer = post(stand, "/v1/completions", {"prompt": "a", "stop": "is"}).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["stop_reason"]) == ("It ", "is")
    assert len(stand.pool.finished) == 1 and not stand.pool.running


def test_client_that_leaves_is_aborted(stand) -> None:
    stand.pool.is_held = True

    async def go() -> None:
        async with stand.client() as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.post("/v1/completions", json={"prompt": "a"}), 0.2)

    asyncio.run(go())
    assert len(stand.pool.aborted) == 1 and stand.service.board.num_requests == 0


def test_deadline(stand) -> None:
    stand.pool.is_held = True
    answer = post(stand, "/v1/completions", {"prompt": "a", "timeout": 0.05})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline"
    events = post(stand, "/v1/completions", {"prompt": "a", "timeout": 0.05, "stream": True})
    assert read_events(events.text)[-1]["error"]["code"] == "deadline"
    assert len(stand.pool.aborted) == 2 and stand.service.board.num_requests == 0


def test_too_many_requests_are_told_to_wait(build_stand: Callable) -> None:
    stand = build_stand(max_num_queued_reqs=1)
    stand.pool.is_held = True

    async def go() -> tuple[httpx.Response, int]:
        async with stand.client() as client:
            waiting = [asyncio.create_task(client.post("/v1/completions", json={"prompt": "a"})) for _ in range(9)]
            while stand.service.board.num_requests < 9:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/completions", json={"prompt": "a"})
            stand.pool.is_held = False
            stand.pool.step()
            answers = await asyncio.gather(*waiting)
            return refused, sum(answer.status_code == 200 for answer in answers)

    refused, num_served = asyncio.run(go())
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert num_served == 9


def test_draining_takes_nothing_new(stand) -> None:
    stand.service.is_draining = True
    assert post(stand, "/v1/completions", {"prompt": "a"}).status_code == 503


def test_request_id_in_use(stand) -> None:
    stand.pool.is_held = True

    async def go() -> httpx.Response:
        async with stand.client() as client:
            first = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a", "request_id": "x"}))
            while not stand.pool.running:
                await asyncio.sleep(0.01)
            second = await client.post("/v1/completions", json={"prompt": "a", "request_id": "x"})
            stand.pool.is_held = False
            stand.pool.step()
            assert (await first).status_code == 200
            return second

    second = asyncio.run(go())
    assert second.status_code == 400 and second.json()["error"]["param"] == "request_id"


def test_no_engine(stand) -> None:
    stand.pool.refusal = RuntimeError("no engine is ready")
    answer = post(stand, "/v1/completions", {"prompt": "a"})
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert stand.service.board.num_requests == 0
