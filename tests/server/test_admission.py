"""A full server refuses before a body is read, in the words and for the origins that it always had."""

import asyncio
import json
from collections.abc import Callable

import pytest

from argosy.server import json_body
from argosy.server.admission import GENERATING_PATHS
from argosy.server.api_server import build_app
from tests.helpers.socket_server import serve_on_socket
from tests.server.test_completions import post

BODIES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/generate": {"prompt_token_ids": [5]},
}


def fill(service, limit: int = 0) -> None:
    """At most ``limit`` completions are taken."""
    service.max_num_running = limit
    object.__setattr__(service.settings, "max_num_queued_reqs", 0)


def test_every_generating_route_is_known(stand) -> None:
    assert BODIES.keys() == GENERATING_PATHS
    assert [post(stand, path, body).status_code for path, body in BODIES.items()] == [200] * 3


@pytest.mark.parametrize("path", BODIES)
def test_a_refused_request_is_not_read(stand, path: str) -> None:
    fill(stand.service)
    sent: list[dict] = []

    async def receive() -> dict:
        pytest.fail("the body was asked for")

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"1000000")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "headers": headers}
    scope |= {"query_string": b"", "raw_path": path.encode(), "root_path": "", "scheme": "http", "server": ("h", 1)}
    asyncio.run(build_app(stand.service)(scope, receive, send))
    start, body = sent
    fields = dict(start["headers"])
    assert start["status"] == 503 and fields[b"retry-after"] == b"1" and fields[b"x-request-id"]
    error = json.loads(body["body"])["error"]
    assert (error["type"], error["code"], error["param"]) == ("overloaded_error", "overloaded", None)
    assert error["message"] == (
        "0 completions are under way and 1 more are asked for, but at most 0 are taken; try again later, or raise "
        "--max-num-queued-reqs"
    )


def test_a_refusal_is_counted_and_needs_the_key(build_stand: Callable) -> None:
    stand = build_stand(api_key=("key",))
    fill(stand.service)
    path, body = "/v1/completions", BODIES["/v1/completions"]
    assert post(stand, path, body).status_code == 401
    assert post(stand, path, body, authorization="Bearer key").status_code == 503
    rendered = stand.service.metrics.render(with_vllm_names=False)
    text = rendered.decode() if isinstance(rendered, bytes) else rendered
    assert [line for line in text.splitlines() if path in line and '"503"' in line and line.endswith(" 1.0")]


def test_other_origins_may_read_a_refusal(build_stand: Callable) -> None:
    stand = build_stand(allowed_origins=("https://example.org",))
    fill(stand.service)
    refused = post(stand, "/v1/completions", BODIES["/v1/completions"], origin="https://example.org")
    assert refused.status_code == 503 and refused.headers["access-control-allow-origin"] == "https://example.org"


def test_where_there_is_room_bodies_are_read_and_other_routes_always(stand, monkeypatch) -> None:
    fill(stand.service, 1)
    assert post(stand, "/v1/completions", {"prompt": "a", "temperature": "x"}).status_code == 400
    assert post(stand, "/v1/completions", {"prompt": "a", "n": 2}).status_code == 503
    fill(stand.service)
    assert post(stand, "/tokenize", {"prompt": "a"}).status_code == 200
    monkeypatch.setattr(json_body, "read_json", lambda body: pytest.fail("read"))
    assert post(stand, "/v1/completions", {"prompt": "a", "temperature": "x"}).status_code == 503


def test_a_connection_goes_on_behind_a_body_that_was_refused_unread(tokenizer) -> None:
    """The refusal comes before the body does, and what then comes of it is no next request."""
    body = json.dumps({"prompt": "POST / HTTP/1.1\r\n\r\n" * 50_000}).encode()
    with serve_on_socket(tokenizer) as server, server.connect() as client:
        fill(server.service)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        client.sendall(f"{head}\r\n\r\n".encode() + body[:1000])
        answers = client.makefile("rb")
        assert read_answer(answers) == (503, "overloaded")
        client.sendall(body[1000:])
        for _ in range(2):
            client.sendall(b"GET /load HTTP/1.1\r\nHost: h\r\n\r\n")
            assert read_answer(answers) == (200, None)


def read_answer(answers) -> tuple[int, str | None]:
    """Its status and its error's code."""
    status = int(answers.readline().split()[1])
    fields = dict(line.split(b": ", 1) for line in iter(answers.readline, b"\r\n"))
    body = json.loads(answers.read(int({name.lower(): value for name, value in fields.items()}[b"content-length"])))
    return status, body.get("error", {}).get("code")
