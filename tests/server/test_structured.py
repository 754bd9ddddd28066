"""Grammars over HTTP: what a request's fields come to, and what never reaches an engine."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine

import httpx
import pytest

from argosy.models.deepseek.encoding import CALLS_START, RESPONSE_FORMAT_HEAD
from argosy.sampling_params import StructuredOutputsParams
from argosy.server.errors import ApiError
from argosy.server.grammar_door import GrammarDoor
from tests.server.conftest import ASSETS

CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": False}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g"}},
]
BOMBS = {
    "many properties": {"json": json.dumps({"properties": {f"p{i}": {} for i in range(12000)}})},
    "deep": {"json": '{"items":' * 900 + "{}" + "}" * 900},
    "deep Lark": {"grammar": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000},
    "repeats": {"regex": "((a{1000}){1000}){1000}"},
    "repeats later": {"grammar": 'start: "x" REST\nREST: /((a{1000}){1000}){1000}/'},
    "choices": {"choice": tuple(f"{i:x}" * 3 for i in range(18_000))},
}


def submitted(stand, body: dict, path: str = CHAT) -> tuple[StructuredOutputsParams | None, str]:
    """The grammar that the engine got, and the prompt."""
    stand.pool.is_held = True

    async def go() -> None:
        async with stand.client() as client:
            post = asyncio.create_task(client.post(path, json=body))
            while not stand.pool.running and not post.done():
                await asyncio.sleep(0.01)
            assert not post.done(), post.result().text
            stand.pool.is_held = False
            request = next(iter(stand.pool.running.values())).request
            found.append((request.sampling_params.structured_outputs, request.prompt_token_ids))
            stand.pool.step()
            assert (await post).status_code == 200

    found: list[tuple[StructuredOutputsParams | None, list[int]]] = []
    asyncio.run(go())
    structured, token_ids = found[0]
    return structured, stand.tokenizer.decode(token_ids, skip_special_tokens=False)


def chat(**fields: object) -> dict:
    return {"messages": [{"role": "user", "content": "hello"}], **fields}


def test_response_format(stand) -> None:
    structured, prompt = submitted(stand, chat(response_format=FORMAT))
    assert structured == StructuredOutputsParams(json=SCHEMA)
    assert RESPONSE_FORMAT_HEAD + json.dumps(SCHEMA) in prompt
    structured, prompt = submitted(stand, chat(response_format={"type": "json_object"}))
    assert structured == StructuredOutputsParams(json={"type": "object"}) and RESPONSE_FORMAT_HEAD not in prompt
    assert submitted(stand, chat(response_format={"type": "text"}))[0] is None


def test_structured_outputs_everywhere(stand) -> None:
    form = {"structured_outputs": {"regex": "[ab]+"}}
    expected = StructuredOutputsParams(regex="[ab]+")
    assert submitted(stand, chat(**form))[0] == expected
    assert submitted(stand, {"prompt": "a", **form}, "/v1/completions")[0] == expected
    assert submitted(stand, {"prompt_token_ids": [5], **form}, "/generate")[0] == expected
    for fields in ({"json": SCHEMA}, {"choice": ["a", "b"]}, {"grammar": 'start: "a"'}, {"json_object": True}):
        assert submitted(stand, chat(structured_outputs=fields))[0] == StructuredOutputsParams(**fields)


def test_a_grammar_begins_behind_the_reasoning(stand) -> None:
    structured, _ = submitted(stand, chat(response_format=FORMAT, chat_template_kwargs={"thinking": True}))
    assert structured is not None
    assert structured.starts_after_token_id == stand.tokenizer.encode_mark("</think>")


def test_calls_that_must_be_made(stand) -> None:
    required, prompt = submitted(stand, chat(tools=TOOLS, tool_choice="required"))
    assert required is not None and required.grammar is not None
    assert "call+" in required.grammar and 'name=\\"g\\"' in required.grammar and CALLS_START in prompt
    choice = {"type": "function", "function": {"name": "g"}}
    named, _ = submitted(stand, chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False))
    assert named is not None and named.grammar is not None
    assert "call+" not in named.grammar and 'name=\\"f\\"' not in named.grammar
    either, _ = submitted(stand, chat(tools=TOOLS, response_format=FORMAT))
    assert either is not None and either.grammar is not None and "start: calls | answer" in either.grammar
    assert submitted(stand, chat(tools=TOOLS, tool_choice="none", response_format=FORMAT))[0] == (
        StructuredOutputsParams(json=SCHEMA)
    )


def test_what_does_not_compile_reaches_no_engine(stand) -> None:
    async def go() -> httpx.Response:
        async with stand.client() as client:
            return await client.post(CHAT, json=chat(structured_outputs={"regex": "(("}))

    answer = asyncio.run(go())
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "structured_outputs"
    assert re.search("unclosed group", answer.json()["error"]["message"]) and not stand.pool.replicas


def run_with_door(use: Callable[[GrammarDoor], Coroutine[None, None, None]], timeout_s: float = 2.0) -> None:
    async def go() -> None:
        door = GrammarDoor(ASSETS, timeout_s)
        try:
            await use(door)
        finally:
            await door.aclose()

    asyncio.run(go())


async def is_refused(door: GrammarDoor, form: dict) -> str:
    with pytest.raises(ApiError) as refused:
        await door.check(StructuredOutputsParams(**form), "structured_outputs")
    assert refused.value.status == 400 and refused.value.param == "structured_outputs"
    return refused.value.message


@pytest.mark.processes
def test_bombs_are_refused_in_bounded_time_and_the_next_grammar_passes() -> None:
    async def use(door: GrammarDoor) -> None:
        await door.check(StructuredOutputsParams(json_object=True), "x")
        for name, form in BOMBS.items():
            started_s = time.monotonic()
            await is_refused(door, form)
            assert time.monotonic() - started_s < 10.0, name
        await door.check(StructuredOutputsParams(choice=tuple(f"choice {i}" for i in range(1000))), "x")

    run_with_door(use)


@pytest.mark.processes
def test_a_grammar_that_takes_too_long_is_told_so_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(door: GrammarDoor) -> None:
        await door.check(StructuredOutputsParams(json_object=True), "x")
        first = door._process
        message = await is_refused(door, BOMBS["many properties"])
        assert "takes longer than 0.05 s" in message and "--grammar-timeout-s" in message
        assert door._process is None and first is not None and first.returncode is not None
        monkeypatch.setattr(door, "_try", lambda data: pytest.fail("it was tried again"))
        assert await is_refused(door, BOMBS["many properties"]) == message

    run_with_door(use, 0.05)
