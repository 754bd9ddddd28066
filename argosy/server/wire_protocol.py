"""uvicorn's HTTP/1.1 protocol with a short way out for the pieces of a stream.

A piece that goes through every layer's ``send`` costs more than all else that is done for its token. ``BodyWriter``
frames it and gives it to the transport. h11's state does not change with a chunk, so it may be left out; the head and
the end of an answer pass it as always. Invariant: nothing is written after the end, or to a client that has left.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

Scope = MutableMapping[str, Any]
BODY_WRITER = "argosy.body_writer"  # the name of the ASGI extension


class BodyWriter:
    """Of one answer that is sent in chunks; to be used between its head and its end."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_open(self) -> bool:
        """False: data must go the usual way, which waits until the client has read, or knows that it has left."""
        cycle = self._cycle
        return not (cycle.flow.write_paused or cycle.disconnected) and cycle.conn.our_state is h11.SEND_BODY

    def write(self, data: bytes) -> None:
        """``data`` is not empty, and the way is open."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class WireProtocol(H11Protocol):
    """Puts a ``BodyWriter`` into the scope's extensions."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._inner = self.app
        self.app = self._run

    async def _run(self, scope: Scope, receive: Callable[..., Any], send: Callable[..., Awaitable[None]]) -> None:
        if scope["type"] == "http" and scope["http_version"] == "1.1":  # older ones know no chunks
            scope["extensions"] = {**scope.get("extensions", {}), BODY_WRITER: BodyWriter(self.cycle)}
        await self._inner(scope, receive, send)
