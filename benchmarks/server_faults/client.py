"""The smallest HTTP client that can also misbehave: it may leave at any byte, and judges every answer.

One connection a request. Invariant: an answer's ``problem`` is empty only if the answer was whole, said its end exactly
once, and nothing followed it.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Answer:
    """What became of one completion."""

    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    problem: str = ""
    started_s: float = 0.0
    first_s: float = 0.0  # from the start to the first token
    total_s: float = 0.0
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int

    async def get(self, path: str) -> Reply:
        """Status 0: nobody answers."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            return Reply(0, {}, b"")
        with contextlib.closing(writer):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            try:
                status, headers = await _read_head(reader)
                return Reply(status, headers, await reader.read())
            except (OSError, asyncio.IncompleteReadError):
                return Reply(0, {}, b"")

    async def complete(self, body: dict[str, object], news: list[int] | None = None) -> Answer:
        """``POST /generate``; ``news`` gets the tokens of a stream as they come."""
        answer = Answer(started_s=time.monotonic())
        try:
            await self._complete(body, answer, answer.token_ids if news is None else news)
        except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
            answer.problem = answer.problem or f"{type(error).__name__}: {error}"
        if news is not None:
            answer.token_ids = news
        answer.total_s = time.monotonic() - answer.started_s
        if not answer.problem and answer.status == 200 and len(answer.ends) != 1:
            answer.problem = f"it ended {len(answer.ends)} times"
        return answer

    async def _complete(self, body: dict[str, object], answer: Answer, tokens: list[int]) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        with contextlib.closing(writer):
            writer.write(build_request(body))
            answer.status, headers = await _read_head(reader)
            answer.retry_after = headers.get("retry-after")
            if answer.status != 200:
                answer.problem = f"HTTP {answer.status}: {(await reader.read())[:200].decode(errors='replace')}"
                return
            if not body.get("stream"):
                data = await reader.readexactly(int(headers["content-length"]))
                _take(json.loads(data), answer, tokens)
                return
            is_done = False
            async for event in _read_events(reader):
                if is_done:
                    answer.problem = "something came after [DONE]"
                is_done = is_done or event == b"[DONE]"
                if event != b"[DONE]":
                    _take(json.loads(event), answer, tokens)
            if not is_done:
                answer.problem = answer.problem or "the stream ended without [DONE]"


def build_request(body: dict[str, object], path: str = "/generate") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def _take(event: dict[str, object], answer: Answer, tokens: list[int]) -> None:
    if "error" in event:
        answer.problem = f"an error in the answer: {event['error']}"
        return
    outputs = event["outputs"]
    assert isinstance(outputs, list)
    for output in outputs:
        if answer.ends:
            answer.problem = "tokens came after the end"
        tokens += output["token_ids"]
        if tokens and not answer.first_s:
            answer.first_s = time.monotonic() - answer.started_s
        if output["finish_reason"] is not None:
            answer.ends.append(output["finish_reason"])


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers


async def _read_events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events in a chunked body, which must be ended by its last chunk."""
    waiting = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        waiting += (await reader.readexactly(size + 2))[:-2]
        *events, waiting = waiting.split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")
