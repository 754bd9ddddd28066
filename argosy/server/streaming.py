"""Server-sent events, and noticing that the client has gone.

An event that takes no waiting is written where its tokens arrive, without waking the task of its request: with many
streams that wake is most of what a token costs. Whatever else comes goes through the task, as everything does where the
connection offers no writer. Invariant: when the answer is over, for whatever reason, ``close`` was called: nobody
computes for a client that left.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from argosy.messages import RequestOutput
from argosy.server.errors import ApiError
from argosy.server.outputs import OutputFeed
from argosy.server.wire_protocol import BODY_WRITER, BodyWriter

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


class TextFrame:
    """Events of one choice that differ in its index and a text: the rest is encoded once."""

    def __init__(self, frame: EventFrame, build_fields: Callable[[int, str], Mapping[str, object]]) -> None:
        """``build_fields``: an event's fields; nothing but constants between the index and the text, and behind it."""
        index, text = -1, "\0"
        head, _, self._tail = frame.fill(build_fields(index, text)).rpartition(_encode(text))
        self._head, _, self._middle = head.rpartition(_encode(index))

    def fill(self, index: int, text: str) -> bytes:
        return b"%b%d%b%b%b" % (self._head, index, self._middle, _encode(text), self._tail)


class StreamedAnswer(Protocol):
    """What becomes a stream. Events come from either method, in the order of the outputs."""

    def events(self, feed: OutputFeed) -> AsyncIterator[bytes]:
        """From the first to the last."""

    def try_event(self, position: int, output: RequestOutput) -> bytes | None:
        """What ``events`` would say of an output that ends no prompt; empty if nothing, None if that takes waiting."""


def as_json(payload: object, status: int = 200) -> Response:
    return Response(_encode(payload), status_code=status, media_type="application/json")


class EventStream(Response):
    """Sends events as they come. An ``ApiError`` while they do becomes the last event: the status has been sent."""

    media_type = "text/event-stream"

    def __init__(self, answer: StreamedAnswer, feed: OutputFeed, close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._feed = feed
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = scope.get("extensions", {}).get(BODY_WRITER)
        sending = asyncio.ensure_future(self._send_all(send, writer))
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

    async def _send_all(self, send: Send, writer: BodyWriter | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if writer is not None:
            self._feed.tell_at_once(_EventTeller(self._answer, writer).try_tell)
        try:
            async for event in self._answer.events(self._feed):
                if writer is not None and writer.is_open:
                    writer.write(event)
                else:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            body = as_event(error.body) + DONE
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _EventTeller:
    """Writes events where their outputs arrive."""

    __slots__ = ("_answer", "_writer")

    def __init__(self, answer: StreamedAnswer, writer: BodyWriter) -> None:
        self._answer = answer
        self._writer = writer

    def try_tell(self, position: int, output: RequestOutput) -> bool:
        if not self._writer.is_open:
            return False  # the task waits until the client has read, or hears that it has left
        event = self._answer.try_event(position, output)
        if event:
            self._writer.write(event)
        return event is not None


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
