"""Keys, sizes, ids, health, and what is closed by default."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from argosy.server.api_server import build_app
from argosy.server.gate import Gate

BODY = {"prompt": "a"}


def ask(stand, method: str, path: str, **options: object) -> httpx.Response:
    async def go() -> httpx.Response:
        async with stand.client() as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/load", "/tokenizer_info", "/nothing"])
def test_keys_guard_everything_but_liveness(build_stand: Callable, path: str) -> None:
    stand = build_stand(api_key=("first", "second"))
    assert ask(stand, "GET", path).status_code == 401
    assert ask(stand, "GET", path, headers={"authorization": "Bearer third"}).status_code == 401
    assert ask(stand, "GET", path, headers={"authorization": "Bearer first "}).status_code in (200, 404)
    assert ask(stand, "GET", path, headers={"authorization": "bearer second"}).status_code in (200, 404)
    for open_path in ("/health", "/ready"):
        assert ask(stand, "GET", open_path).status_code == 200


def test_admin_routes_need_their_own_key(build_stand: Callable) -> None:
    body = {"all": True}
    closed = build_stand(api_key=("key",))
    assert ask(closed, "POST", "/abort_requests", json=body, headers={"authorization": "Bearer key"}).status_code == 403
    stand = build_stand(api_key=("key",), admin_api_key="admin")
    for key, status in (("key", 401), ("admin", 200)):
        headers = {"authorization": f"Bearer {key}"}
        assert ask(stand, "POST", "/abort_requests", json=body, headers=headers).status_code == status


def test_admin_ends_a_request(build_stand: Callable) -> None:
    stand = build_stand(admin_api_key="admin")
    stand.pool.is_held = True

    async def go() -> tuple[httpx.Response, httpx.Response]:
        async with stand.client() as client:
            waiting = asyncio.create_task(client.post("/v1/completions", json=BODY | {"request_id": "x"}))
            while not stand.pool.running:
                await asyncio.sleep(0.01)
            headers = {"authorization": "Bearer admin"}
            told = await client.post("/abort_requests", json={"request_ids": ["x", "y"]}, headers=headers)
            return told, await waiting

    told, ended = asyncio.run(go())
    assert told.json() == {"aborted": ["x"]}
    assert ended.status_code == 503 and ended.json()["error"]["code"] == "aborted"
    assert stand.pool.aborted == ["x"]


def test_sizes(build_stand: Callable) -> None:
    stand = build_stand(max_body_bytes=2048, max_header_bytes=2048)
    assert ask(stand, "POST", "/v1/completions", json={"prompt": "a" * 3000}).status_code == 413
    assert ask(stand, "GET", "/health", headers={"x-long": "a" * 3000}).status_code == 431

    async def chunks():  # without a Content-Length
        for _ in range(10):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    assert ask(stand, "POST", "/v1/completions", content=chunks(), headers=headers).status_code == 413


def test_only_json_bodies(stand) -> None:
    answer = ask(stand, "POST", "/v1/completions", content=b"prompt=a", headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and answer.json()["error"]["message"]


def test_request_ids(stand) -> None:
    assert ask(stand, "GET", "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = ask(stand, "GET", "/health", headers={"x-request-id": "a\tb"}).headers["x-request-id"]
    assert made != "a\tb" and len(made) == 32
    answer = ask(stand, "POST", "/v1/completions", json=BODY, headers={"x-request-id": "abc-2"})
    assert answer.json()["id"] == "cmpl-abc-2"


@pytest.mark.parametrize("path", ["/health", "/nothing"])
def test_an_answer_is_sent_before_it_is_told(stand, path: str) -> None:
    """A log that is written slowly delays nobody's answer."""
    happened: list[str] = []
    gate = Gate(build_app(stand.service), stand.service.settings, lambda *told: happened.append(f"told {told[2]}"))

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        happened.append(str(message["type"]))

    async def go() -> None:
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "headers": []}
        scope |= {"query_string": b"", "raw_path": path.encode(), "root_path": "", "scheme": "http", "server": ("h", 1)}
        await gate(scope, receive, send)
        await asyncio.sleep(0)

    asyncio.run(go())
    status = 200 if path == "/health" else 404
    assert happened == ["http.response.start", "http.response.body", f"told {status}"]


def test_unknown_routes_and_methods(stand) -> None:
    assert ask(stand, "GET", "/nothing").json()["error"]["code"] == 404
    assert ask(stand, "GET", "/v1/completions").status_code == 405


def test_ready_fails_before_health_while_draining(stand) -> None:
    stand.service.is_draining = True
    assert ask(stand, "GET", "/ready").status_code == 503
    assert ask(stand, "GET", "/health").status_code == 200


def test_health_tells_of_engines(stand) -> None:
    stand.service._describe_health = lambda: "engine 0 is restarting"
    for path in ("/health", "/ready"):
        answer = ask(stand, "GET", path)
        assert answer.status_code == 503 and "engine 0" in answer.text


def test_models_and_tokens(stand) -> None:
    models = ask(stand, "GET", "/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("argosy-tiny", 2048)]
    told = ask(stand, "POST", "/tokenize", json={"prompt": "6 * 7?", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["tokens"] == stand.tokenizer.encode_prompt("6 * 7?")
    text = ask(stand, "POST", "/detokenize", json={"tokens": stand.tokenizer.encode("6 * 7?")}).json()["prompt"]
    assert text == "6 * 7?"
    chat = ask(stand, "POST", "/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["tokens"][0] == stand.tokenizer.bos_token_id


def test_metrics(build_stand: Callable) -> None:
    stand = build_stand(vllm_metric_names=True)
    for _ in range(3):
        assert ask(stand, "POST", "/v1/completions", json=BODY).status_code == 200
    text = ask(stand, "GET", "/metrics").text
    for prefix in ("argosy:", "vllm:"):
        for name in ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count"):
            assert f'{prefix}{name}{{model_name="argosy-tiny"}} 3.0' in text
    assert 'argosy:request_success_total{finished_reason="stop",model_name="argosy-tiny"} 3.0' in text
    num_tokens = 3 * (len(stand.tokenizer.encode("It is 42.")) + 1)
    assert f'argosy:generation_tokens_total{{model_name="argosy-tiny"}} {num_tokens:.1f}' in text
