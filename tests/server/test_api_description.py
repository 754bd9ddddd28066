"""/openapi.json says what is so: all routes, the shapes of real answers, errors, keys; a tool that reads it agrees."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest
from pydantic import BaseModel, TypeAdapter

from argosy.server import answers
from argosy.server.api_description import ROUTES
from tests.helpers.socket_server import serve_on_socket

CHAT = {"messages": [{"role": "user", "content": "a"}]}
SCHEMATHESIS_S = 60
CHECKS = Path(__file__).parent / "schemathesis.toml"
ANSWERS = [
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "return_token_ids": True}),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "a b", "echo": True, "logprobs": 1, "max_tokens": 0}),
    ("/v1/completions", {"prompt": ["a b", "c"], "echo": True, "logprobs": 2, "prompt_logprobs": 1}),
    ("/v1/chat/completions", CHAT | {"n": 2, "prompt_logprobs": 2}),
    ("/generate", {"prompt_token_ids": [5, 6], "logprobs": 1, "prompt_logprobs": 1}),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("/detokenize", {"tokens": [5]}),
    ("/abort_requests", {"all": True}),
]
PAGES = [
    "/deployment",
    "/v1/models",
    "/v1/models/argosy-tiny",
    "/health",
    "/ready",
    "/version",
    "/load",
    "/tokenizer_info",
]


def ask(stand, method: str, path: str, **options: object) -> httpx.Response:
    async def go() -> httpx.Response:
        async with stand.client(authorization="Bearer admin") as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


def check(shape: type[BaseModel] | type[msgspec.Struct], content: bytes) -> None:
    if issubclass(shape, msgspec.Struct):
        msgspec.json.decode(content, type=shape)
    else:
        TypeAdapter(shape).validate_json(content, strict=True)


@pytest.mark.parametrize(("path", "body"), ANSWERS)
def test_answers_have_the_shapes_described(build_stand: Callable, path: str, body: dict) -> None:
    stand = build_stand(admin_api_key="admin")
    route = ROUTES[path]
    answer = ask(stand, "POST", path, json=body)
    assert answer.status_code == 200 and route.shape is not None
    check(route.shape, answer.content)
    check(answers.ErrorAnswer, ask(stand, "POST", path, json={"surprise": 1}).content)
    if route.event is not None:
        options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        stream = ask(stand, "POST", path, json=body | options)
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
        assert len(events) >= 3 and events[-1] == "[DONE]"
        for event in events[:-1]:
            check(route.event, event.encode())


@pytest.mark.parametrize("path", PAGES)
def test_pages_have_the_shapes_described(build_stand: Callable, path: str) -> None:
    shape = ROUTES[path.replace("argosy-tiny", "{name}")].shape
    assert shape is not None
    check(shape, ask(build_stand(), "GET", path).content)


def test_the_document(build_stand: Callable) -> None:
    stand = build_stand(api_key=("key",), admin_api_key="admin")
    document = ask(stand, "GET", "/openapi.json").json()
    assert set(document["paths"]) == set(ROUTES)
    schemas = document["components"]["schemas"]
    references = {text.split('"')[0] for text in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(schemas) and "HTTPValidationError" not in schemas
    complete = document["paths"]["/v1/completions"]["post"]
    assert set(complete["responses"]) == {"200", "400", "401", "404", "408", "413", "415", "431", "500", "503", "504"}
    assert complete["security"] == [{"key": []}]
    assert set(complete["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["paths"]["/health"]["get"]["security"] == []
    open_document = ask(build_stand(), "GET", "/openapi.json").json()
    assert open_document["paths"]["/v1/completions"]["post"]["security"] == []
    assert "401" not in open_document["paths"]["/v1/completions"]["post"]["responses"]


@pytest.mark.processes
def test_schemathesis_agrees(tokenizer, tmp_path: Path) -> None:
    """Its default checks, a few cases a route, always the same."""
    program = shutil.which("schemathesis", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("schemathesis is not installed: make schemathesis")
    with serve_on_socket(tokenizer, api_key=("key",), admin_api_key="admin") as server:
        command = [program, "--config-file", str(CHECKS), "run", f"{server.url}/openapi.json", "--no-color"]
        command += ["-H", "Authorization: Bearer admin", "--phases", "fuzzing", "--max-examples", "8", "--seed", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCHEMATHESIS_S, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
