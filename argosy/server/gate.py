"""What every request passes before its route: size, key, and the headers of its answer. Pure ASGI, no buffering.

Everything is denied unless a path is named here. Keys are compared in constant time. Invariant: a body larger than
allowed is never held in memory, and no answer leaves without X-Request-Id.
"""

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from argosy.server.errors import ApiError
from argosy.server.settings import ServerConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# (method, path, status, request id, seconds since the request arrived)
OnAnswer = Callable[[str, str, int, str, float], None]

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/openapi.json", "/favicon.ico"})
ADMIN_PATHS = frozenset({"/abort_requests"})
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_MAX_LENGTH_DIGITS = 18


class Gate:
    """The outermost application. ``on_answer`` hears of every answer's start, after it was sent."""

    def __init__(self, app: App, settings: ServerConfig, on_answer: OnAnswer) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._max_header_bytes = settings.max_header_bytes
        self._body_timeout_s = settings.body_timeout_s
        self._keys = tuple(key.encode() for key in settings.api_key)
        self._admin_key = None if settings.admin_api_key is None else settings.admin_api_key.encode()
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        request_id = _read_request_id(headers)
        started_s = time.monotonic()
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        body = _BoundedBody(receive, self._max_body_bytes, self._body_timeout_s)

        async def send_with_id(message: Message) -> None:
            if body.error is not None and not is_ours:
                return  # the application's own words about a body that it could not read
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                # What is left of a body that was given up would be read for nothing.
                if isinstance(error, UnsafeRequestError) or body.error is not None:
                    message["headers"].append((b"connection", b"close"))
                duration_s = time.monotonic() - started_s
                # NOTE(order): behind what is sent now; whoever reads the log may be slow, and nobody waits for it.
                told = scope["method"], scope["path"], message["status"], request_id, duration_s
                asyncio.get_running_loop().call_soon(self._on_answer, *told)
            await send(message)

        is_ours = False
        error: ApiError | None = None
        try:
            self._check(scope, headers)
            await self._app(scope, body.receive, send_with_id)
            error = body.error
        except ApiError as refusal:
            error = refusal
        if error is not None:
            is_ours = True
            await error.as_response()(scope, receive, send_with_id)

    def _check(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        _check_shape(scope, headers)
        num_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
        if num_bytes > self._max_header_bytes:
            raise ApiError(431, f"the headers have {num_bytes} bytes, at most {self._max_header_bytes} are allowed")
        fields = dict(headers)
        self._check_key(scope["path"], fields.get(b"authorization", b""))
        length = fields.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > _MAX_LENGTH_DIGITS:
            raise ApiError(400, "Content-Length is not a number of bytes")
        if int(length) > self._max_body_bytes:
            raise _too_large(int(length), self._max_body_bytes)

    def _check_key(self, path: str, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        is_admin = self._admin_key is not None and hmac.compare_digest(given, self._admin_key)
        if path in ADMIN_PATHS:
            if self._admin_key is None:
                raise ApiError(403, f"{path} is closed: the server has no admin key; start it with --admin-api-key")
            if not is_admin:
                raise ApiError(401, f"{path} needs the admin key: Authorization: Bearer <key>", code="invalid_api_key")
            return
        if path in OPEN_PATHS or not self._keys or is_admin:
            return
        # All keys are compared, so that the time does not tell which one nearly fitted.
        if not any([hmac.compare_digest(given, known) for known in self._keys]):
            found = "a wrong key" if given else "no key"
            raise ApiError(401, f"{found} was given; send Authorization: Bearer <key>", code="invalid_api_key")


class UnsafeRequestError(ApiError):
    """Where this request ends is not certain, so its connection ends with it."""


class _BoundedBody:
    """A request's body, up to a size and a time; beyond them ``error`` is set, and whoever reads gets it raised."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self.error: ApiError | None = None
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._is_whole = False
        self._num_bytes = 0

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(None if self._is_whole else self._deadline_s):
                message = await self._receive()
        except TimeoutError as error:
            self.error = UnsafeRequestError(408, f"the body was not complete within {self._timeout_s:g} s")
            raise self.error from error
        self._is_whole = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            self.error = _too_large(self._num_bytes, self._max_bytes)
            raise self.error
        return message


def _check_shape(scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
    names = [name for name, _ in headers]
    if b"content-length" in names and b"transfer-encoding" in names:
        # A proxy in front may take the other one for true, and what follows for another request.
        raise UnsafeRequestError(400, "the request has both Content-Length and Transfer-Encoding; send one of them")
    if scope.get("http_version") not in ("1.0", "1.1"):
        raise UnsafeRequestError(400, f"HTTP {scope.get('http_version')} is not spoken here; send HTTP/1.1")


def _too_large(num_bytes: int, max_bytes: int) -> ApiError:
    return ApiError(413, f"the body has {num_bytes} bytes or more, at most {max_bytes} are allowed")


def _read_request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The caller's, if it is harmless, else a new one."""
    given = dict(headers).get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
