"""A real socket and clients that misbehave below HTTP's fields: slow, many, early gone, or with two meanings."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator

import pytest

from argosy.server.connections import allow_connections
from tests.helpers.socket_server import SocketServer, serve_on_socket

BODY = b'{"prompt": "a"}'
HEAD_S = 0.6
BODY_S = 0.6
MAX_CONNECTIONS = 40
ROUTE = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CLOSING = ROUTE + b"Connection: close\r\nContent-Length: 15\r\n\r\n" + BODY
WHOLE = ROUTE + b"Content-Length: 15\r\n\r\n" + BODY


@pytest.fixture(scope="module")
def server(tokenizer) -> Iterator[SocketServer]:
    limits = {"head_timeout_s": HEAD_S, "body_timeout_s": BODY_S, "max_connections": MAX_CONNECTIONS}
    with serve_on_socket(tokenizer, max_body_bytes=4096, max_header_bytes=4096, **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def good_request_after_it(server: SocketServer) -> Iterator[None]:
    yield
    deadline_s = time.monotonic() + 5
    while (answer := exchange(server, CLOSING)).startswith(b"HTTP/1.1 503") and time.monotonic() < deadline_s:
        time.sleep(0.05)  # connections that the test has closed are noticed one after another
    assert answer.startswith(b"HTTP/1.1 200") and b"It is 42." in answer
    assert not server.pool.running and not server.service.board.num_requests


def exchange(server: SocketServer, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What comes back until the server closes; the client closes its half only then."""
    with server.connect() as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
            for part in parts:
                client.sendall(part)
                time.sleep(pause_s)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    told = b""
    try:
        while part := client.recv(65536):
            told += part
    except ConnectionResetError:
        pass
    return told


def status_of(answer: bytes) -> int:
    """Of an answer with an error object."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["message"], answer
    return int(head.split()[1])


NOT_HTTP = {
    "random": bytes(range(256)),
    "zeros": bytes(5000),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "version 3": b"GET /health HTTP/3.0\r\nHost: x\r\n\r\n",
    "space in target": b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "header without colon": b"GET /health HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n",
    "space before colon": b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
    "null in a header": b"GET /health HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
    "folded": b"GET /health HTTP/1.1\r\n Host: x\r\n\r\n",
    "negative length": ROUTE + b"Content-Length: -1\r\n\r\n",
    "length plus": ROUTE + b"Content-Length: +15\r\n\r\n" + BODY,
    "endless length": ROUTE + b"Content-Length: " + b"9" * 3000 + b"\r\n\r\n",
    "two lengths": ROUTE + b"Content-Length: 15\r\nContent-Length: 16\r\n\r\n" + BODY,
    "hex length": ROUTE + b"Content-Length: 0xf\r\n\r\n" + BODY,
    "unknown coding": ROUTE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "two codings": ROUTE + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a line of a megabyte": b"GET /" + b"a" * 2**20,
    "a header of a megabyte": b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 2**20,
    "many headers": b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_what_is_not_http_gets_an_error_object(server: SocketServer, name: str) -> None:
    answer = b""
    with server.connect() as client:
        try:
            client.sendall(NOT_HTTP[name])
        except (BrokenPipeError, ConnectionResetError):  # it had read enough
            assert len(NOT_HTTP[name]) > 8192
        else:
            with contextlib.suppress(OSError):  # it has closed already
                client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    if answer or len(NOT_HTTP[name]) <= 8192:  # a reset may overtake the answer to what was never read
        assert status_of(answer) in (400, 431, 501)


def test_a_head_that_never_ends_is_given_up(server: SocketServer) -> None:
    for parts in ([], [b"GET /hea"], [b"GET /health HTTP/1.1\r\n"] + [b"A: b\r\n"] * 20, [WHOLE, b"GET /hea"]):
        started_s = time.monotonic()
        answer = exchange(server, *parts, pause_s=0.05)
        assert time.monotonic() - started_s < 4 * HEAD_S
        assert status_of(answer[answer.rindex(b"HTTP/1.1") :]) == 408


def test_a_body_that_never_ends_is_given_up(server: SocketServer) -> None:
    started_s = time.monotonic()
    answer = exchange(server, ROUTE + b"Content-Length: 15\r\n\r\n", *[b" "] * 8, pause_s=0.1)
    assert status_of(answer) == 408 and time.monotonic() - started_s < 4 * (HEAD_S + BODY_S)
    assert status_of(exchange(server, ROUTE + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab")) == 408


@pytest.mark.parametrize("sent", [b"", b'{"pro', BODY[:-1]])
def test_bodies_that_end_early_start_nothing(server: SocketServer, sent: bytes) -> None:
    for head in (b"Content-Length: 15\r\n\r\n" + sent, b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + sent):
        with server.connect() as client:
            client.sendall(ROUTE + head)
    for chunks in (b"zz\r\n", b"-5\r\nabcde\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"f" * 30 + b"\r\n"):
        assert status_of(exchange(server, ROUTE + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)) == 400


def test_requests_with_two_lengths_are_refused_whole(server: SocketServer) -> None:
    hidden = b"GET /load HTTP/1.1\r\nHost: x\r\n\r\n"
    for fields in (
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 99",
    ):
        answer = exchange(server, ROUTE + fields + b"\r\n\r\n0\r\n\r\n" + hidden)
        assert status_of(answer) == 400  # one answer: what follows is nobody's request
    assert status_of(exchange(server, ROUTE + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + hidden)) in (
        400,
        501,
    )


def test_pipelined_requests_are_answered_in_order(server: SocketServer) -> None:
    ids = [b"X-Request-Id: r%d" % i for i in range(20)]
    answer = exchange(server, b"".join(WHOLE.replace(b"Host: x", b"Host: x\r\n" + each) for each in ids) + CLOSING)
    assert re.findall(rb"cmpl-(r\d+)", answer) == [each.split()[1] for each in ids]
    assert answer.count(b"HTTP/1.1 200") == 21


def test_connections_beyond_the_limit_are_refused_at_once(server: SocketServer) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(MAX_CONNECTIONS)]
        started_s = time.monotonic()
        answers = [exchange(server) for _ in range(200)]
        assert {status_of(answer) for answer in answers} == {503} and all(b"Retry-After" in each for each in answers)
        assert time.monotonic() - started_s < 200 * HEAD_S / 10
        assert all(b"408" in read_all(client) for client in idle)  # and those that are idle do not stay


def test_large_bodies_and_headers(server: SocketServer) -> None:
    closing = b"Connection: close\r\n"
    assert status_of(exchange(server, ROUTE + closing + b"Content-Length: 5000\r\n\r\n" + b" " * 5000)) == 413
    assert status_of(exchange(server, ROUTE + closing + b"A: " + b"a" * 5000 + b"\r\n\r\n")) == 431
    chunked = ROUTE + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b" " * 1024 + b"\r\n"
    chunks = [b"400\r\n" + b" " * 1024 + b"\r\n"] * 8
    # It closes, for what follows would be read for nothing; now and then a reset overtakes the answer.
    answers = [exchange(server, chunked, *chunks) for _ in range(5)]
    assert {status_of(answer) for answer in answers if answer} == {413}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "QUERY"])
def test_methods(server: SocketServer, method: str) -> None:
    for path in ("/v1/completions", "/health", "/metrics"):
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        answer = exchange(server, head)
        assert answer.startswith(b"HTTP/1.1 405") and re.search(rb"allow: (GET|POST)\r", answer)
        assert method == "HEAD" or status_of(answer) == 405


@pytest.mark.parametrize(
    "path",
    [
        "//",
        "/v1",
        "/v1/completions/",
        "/v1//completions",
        "/../etc/passwd",
        "/v1/%2e%2e/health",
        "/%00",
        "/docs",
        "/redoc",
    ]
    + ["/health/", "/health%20", "/\xff", "/v1/completions;a", "/Health", "/.git/config", "http://other/health", "*"],
)
def test_paths(server: SocketServer, path: str) -> None:
    target = path.encode("latin-1").replace(b"\xff", b"%FF")
    answer = exchange(server, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert status_of(answer) in (400, 404)


def test_a_host_that_is_no_host_breaks_nothing(server: SocketServer) -> None:
    for host in (b"[::", b"a b", b"\xff", b"x:y:z", b"", b"http://x"):
        answer = exchange(server, b"GET /nothing HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert status_of(answer) in (400, 404)


def test_content_types(server: SocketServer) -> None:
    def ask(fields: str) -> bytes:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 15\r\n{fields}\r\n\r\n"
        )
        return exchange(server, head.encode() + BODY)

    for kind in ("text/plain", "", "application/jsonx", "text/json", "multipart/form-data; boundary=x", "application"):
        assert status_of(ask(f"Content-Type: {kind}")) == 415, kind
    assert status_of(ask("Content-Type: application/json\r\nContent-Encoding: gzip")) == 415
    assert status_of(ask("A: b")) == 415
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert ask(f"Content-Type: {kind}").startswith(b"HTTP/1.1 200")


def test_more_connections_than_the_system_allows_are_refused_at_the_start() -> None:
    with pytest.raises(RuntimeError, match="max_connections .* open files"):
        allow_connections(10**12)
