"""Streams over a real socket: chunks are framed as HTTP wants them, and older clients get none."""

import asyncio
import socket
from collections.abc import Callable

from argosy.server.run import Endpoint, build_server
from argosy.server.wire_protocol import BodyWriter

BODY = b'{"prompt": "6 * 7?", "stream": true, "request_id": "r"}'


async def talk(stand, speak: Callable) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = build_server(stand.service, stand.service.settings, Endpoint(listener))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await asyncio.wait_for(speak(reader, writer), 30)
            writer.close()
        finally:
            server.should_exit = True
            await running


def head(version: str, body: bytes, connection: str) -> bytes:
    fields = f"Host: h\r\nContent-Type: application/json\r\nConnection: {connection}\r\nContent-Length: {len(body)}"
    return f"POST /v1/completions HTTP/{version}\r\n{fields}\r\n\r\n".encode() + body


async def read_chunks(reader: asyncio.StreamReader) -> list[bytes]:
    chunks = []
    while size := int(await reader.readline(), 16):
        chunks.append(await reader.readexactly(size))
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readexactly(2) == b"\r\n"
    return chunks


def strip_times(data: bytes) -> list[bytes]:
    return [event.partition(b'"choices"')[2] for event in data.split(b"\n\n")]


def test_a_stream_is_chunked_and_the_connection_goes_on(stand, monkeypatch) -> None:
    """What arrives is what the application says without a socket."""
    written: list[bytes] = []
    write = BodyWriter.write
    monkeypatch.setattr(BodyWriter, "write", lambda self, data: written.append(data) or write(self, data))
    streams: list[list[bytes]] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(head("1.1", BODY, "keep-alive"))
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200") and b"transfer-encoding: chunked" in answer.lower()
            streams.append(await read_chunks(reader))

    asyncio.run(talk(stand, speak))

    async def ask() -> bytes:
        async with stand.client() as client:
            return (
                await client.post("/v1/completions", content=BODY, headers={"content-type": "application/json"})
            ).content

    expected = strip_times(asyncio.run(ask()))
    assert [strip_times(b"".join(chunks)) for chunks in streams] == [expected] * 2
    assert len(streams[0]) > 5 and written == streams[0] + streams[1], "the short way was not taken"


def test_a_client_of_http_1_0_gets_no_chunks(stand) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head("1.0", BODY, "close"))
        answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert b"chunked" not in answer.lower()
        assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")

    asyncio.run(talk(stand, speak))
