"""Server-sent events, and noticing that the client has gone.

Invariant: when the answer is over, for whatever reason, ``close`` was called: nobody computes for a client that left.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from argosy.server.errors import ApiError
from argosy.server.wire_protocol import BODY_WRITER

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
CLIENT_GONE_STATUS = 499  # nobody reads it; logs and metrics do
_encode = msgspec.json.Encoder().encode


def as_event(payload: object) -> bytes:
    return b"data: " + _encode(payload) + b"\n\n"


class EventFrame:
    """Events that begin alike: what they share, which must not be empty, is encoded once."""

    def __init__(self, base: Mapping[str, object]) -> None:
        self._head = b"data: " + _encode(base)[:-1] + b","

    def fill(self, fields: Mapping[str, object]) -> bytes:
        """An event with these fields, at least one, behind the shared ones."""
        return b"%b%b\n\n" % (self._head, _encode(fields)[1:])


def as_json(payload: object, status: int = 200) -> Response:
    return Response(_encode(payload), status_code=status, media_type="application/json")


class EventStream(Response):
    """Sends events as they come. An ``ApiError`` while they do becomes the last event: the status has been sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = scope.get("extensions", {}).get(BODY_WRITER)
        write = _never if writer is None else writer.write
        sending = asyncio.ensure_future(self._send_all(send, write))
        leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_all(self, send: Send, write: Callable[[bytes], bool]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                if not write(event):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            body = as_event(error.body) + DONE
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _never(data: bytes) -> bool:
    return False


async def run_until_disconnect(request: Request, work: Awaitable[T], close: Callable[[], None]) -> T | None:
    """The result of ``work``; None if the client left before. ``close`` is called in any case."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        close()
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
