"""Connections that keep to the rules: how many there are, how long a request's head may take, what HTTP nonsense gets.

uvicorn waits for a request without limit and answers nonsense in plain text; here both are bounded. What a complete
request may be is ``gate.py``'s. Invariant: a connection on which no request is being answered ends by itself.
"""

import asyncio
import resource
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import msgspec

from argosy.server.errors import ApiError, overloaded
from argosy.server.wire_protocol import WireProtocol

_SPARE_FILES = 256  # beside connections: logs, engines, libraries
_REASONS = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``head_s``: from the first chance to send a request's head until it is complete."""

    max_connections: int
    head_s: float


class BoundedConnection(WireProtocol):
    """One client's connection."""

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._limits = limits
        self._head_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        num_connections = len(self.connections)
        if num_connections > self._limits.max_connections:
            self._refuse(
                overloaded(
                    f"{num_connections} connections are open, at most {self._limits.max_connections} are taken; "
                    "use fewer, or raise --max-connections"
                )
            )
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._is_answering:
            self._forget_deadline()
        elif self._head_deadline is None:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """To what is not HTTP; a client whose answer has begun can only be left."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(ApiError(400, "this is not a valid HTTP request"))
        else:
            self.transport.close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._head_deadline = self.loop.call_later(self._limits.head_s, self._give_up)

    def _forget_deadline(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _give_up(self) -> None:
        self._head_deadline = None
        if self.transport.is_closing() or self._is_answering:
            return
        if self.conn.our_state is h11.IDLE:
            self._refuse(ApiError(408, f"no request was complete within {self._limits.head_s:g} s"))
        else:  # it was answered, and still sends a body that nobody wants
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Written by hand: h11 would not let a request that is not whole be answered."""
        body = msgspec.json.encode(error.body)
        retry = "" if error.retry_after_s is None else f"Retry-After: {error.retry_after_s}\r\n"
        head = (
            f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def bounded_protocol(limits: ConnectionLimits) -> Any:
    """For uvicorn's ``http``, which makes one for every connection."""
    return partial(BoundedConnection, limits=limits)


def allow_connections(max_connections: int) -> None:
    """Raise this process's limit of open files to what so many connections need.

    Raises:
        RuntimeError: the system forbids it.
    """
    needed = max_connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(
            f"max_connections ({max_connections}) needs {needed} open files, but this process may have {hard}; "
            "set --max-connections lower, or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
