"""What every request passes before its route: size, key, and the headers of its answer. Pure ASGI, no buffering.

Everything is denied unless a path is named here. Keys are compared in constant time. Invariant: a body larger than
allowed is never held in memory, and no answer leaves without X-Request-Id.
"""

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
_JSON_TYPES = (b"application/json", b"text/json")


class Gate:
    """The outermost application. ``on_answer`` hears of every answer's start."""

    def __init__(self, app: App, settings: ServerConfig, on_answer: OnAnswer) -> None:
        self._app = app
        self._max_body_bytes = settings.max_body_bytes
        self._max_header_bytes = settings.max_header_bytes
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

        body = _BoundedBody(receive, self._max_body_bytes)

        async def send_with_id(message: Message) -> None:
            if body.error is not None and not is_ours:
                return  # the application's own words about a body that it could not read
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                duration_s = time.monotonic() - started_s
                self._on_answer(scope["method"], scope["path"], message["status"], request_id, duration_s)
            await send(message)

        is_ours = False
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
        num_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
        if num_bytes > self._max_header_bytes:
            raise ApiError(431, f"the headers have {num_bytes} bytes, at most {self._max_header_bytes} are allowed")
        self._check_key(scope["path"], dict(headers).get(b"authorization", b""))
        fields = dict(headers)
        length = fields.get(b"content-length")
        if length is not None and length.isdigit() and int(length) > self._max_body_bytes:
            raise _too_large(int(length), self._max_body_bytes)
        if scope["method"] == "POST" and not fields.get(b"content-type", b"").lower().startswith(_JSON_TYPES):
            raise ApiError(415, "the body must be JSON; send Content-Type: application/json")

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


class _BoundedBody:
    """A request's body, up to a size; beyond it ``error`` is set, and whoever reads gets it raised."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self.error: ApiError | None = None
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            self.error = _too_large(self._num_bytes, self._max_bytes)
            raise self.error
        return message


def _too_large(num_bytes: int, max_bytes: int) -> ApiError:
    return ApiError(413, f"the body has {num_bytes} bytes or more, at most {max_bytes} are allowed")


def _read_request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The caller's, if it is harmless, else a new one."""
    given = dict(headers).get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
