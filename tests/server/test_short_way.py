"""Events are written where their tokens arrive; the way through the request's task is the plain twin, byte for byte."""

import asyncio
import json
import random
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from argosy.messages import CompletionOutput, RequestMetrics, RequestOutput
from argosy.server.chat import ChatAnswer
from argosy.server.chat_stream import ChatStream
from argosy.server.completions import CompletionAnswer, GenerateAnswer
from argosy.server.outputs import OutputFeed
from argosy.server.streaming import EventFrame, TextFrame
from argosy.server.wire_protocol import BodyWriter
from tests.server.test_completions import TOOLS
from tests.server.test_wire_protocol import read_chunks, talk

TEXT = 'Let me "see":\n6 * 7 \\ ä 中.</think>It is 42 😀, and\n\n<that> is all.'
MESSAGES = [{"role": "user", "content": "6 * 7?"}]
USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS = {"stream_options": {"continuous_usage_stats": True, "include_usage": True}}
CASES = {
    "completion": ("/v1/completions", {"prompt": "a", "max_tokens": 60}),
    "completion, usage": ("/v1/completions", {"prompt": "a", "max_tokens": 60, **USAGE}),
    "completion, continuous usage": ("/v1/completions", {"prompt": "a", "max_tokens": 60, **CONTINUOUS}),
    "completions": ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "echo": True, "max_tokens": 60}),
    "completion, stop": ("/v1/completions", {"prompt": "a", "max_tokens": 60, "stop": ["is 42", "6 * 8"]}),
    "completion, logprobs": ("/v1/completions", {"prompt": "a", "max_tokens": 60, "logprobs": 1, "echo": True}),
    "completion, ids": ("/v1/completions", {"prompt": "a", "max_tokens": 60, "return_token_ids": True}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "chat, usage": ("/v1/chat/completions", {"messages": MESSAGES, "n": 2, **USAGE}),
    "chat, continuous usage": ("/v1/chat/completions", {"messages": MESSAGES, **CONTINUOUS}),
    "chat, thinking": ("/v1/chat/completions", {"messages": MESSAGES, "reasoning_effort": "high"}),
    "chat, tools": ("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS}),
    "chat, logprobs": ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}),
    "chat, prompt": ("/v1/chat/completions", {"messages": MESSAGES, "prompt_logprobs": 1}),
    "generate": ("/generate", {"prompt_token_ids": [5, 6], "max_tokens": 60, **USAGE}),
}
SHORT = {
    name for name in CASES if name not in ("completion, continuous usage", "completion, logprobs", "completion, ids")
}


def stream(stand, path: str, body: dict) -> bytes:
    """What a client reads."""
    data = json.dumps(body | {"stream": True, "temperature": 0, "request_id": "r"}).encode()
    chunks: list[bytes] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        chunks.extend(await read_chunks(reader))

    asyncio.run(talk(stand, speak))
    return b"".join(chunks)


@pytest.mark.parametrize("name", CASES)
def test_the_short_way_says_what_the_long_one_says(build_stand: Callable, name: str, monkeypatch) -> None:
    """Also where a slow client makes a stream change ways at any event."""
    monkeypatch.setattr("time.time", lambda: 1e9)
    told = []
    for kind in (CompletionAnswer, ChatAnswer, GenerateAnswer):

        def count(self, *output, true=kind.try_event):
            told.append(true(self, *output))
            return told[-1]

        monkeypatch.setattr(kind, "try_event", count)
    is_open, is_plain = BodyWriter.is_open.fget, ChatStream.is_plain
    said = []
    for chance in (0.0, 1.0, 0.6, 0.3):
        told.clear()
        draw = random.Random(7).random
        if chance == 0.0:
            monkeypatch.setattr(ChatStream, "is_plain", False)  # no events from a text frame either
        else:
            monkeypatch.setattr(ChatStream, "is_plain", is_plain)
        monkeypatch.setattr(BodyWriter, "is_open", property(lambda self, c=chance, d=draw: is_open(self) and d() < c))
        said.append(stream(build_stand(TEXT), *CASES[name]))
        num_told = sum(event is not None for event in told)
        assert not told if chance == 0.0 else chance < 1.0 or (num_told > 5) == (name in SHORT)
    assert said[0].endswith(b"data: [DONE]\n\n") and said[0].count(b"\n\n") > 10
    assert said == [said[0]] * 4


@given(st.text(), st.integers(0, 10**6), st.text())
@example("a-1", 3, 'v-1"\0')
def test_a_text_frame_is_the_event_of_its_text(text: str, index: int, model: str) -> None:
    frame = EventFrame({"id": "x", "model": model})

    def build(index: int, text: str) -> dict[str, object]:
        return {"choices": [{"index": index, "delta": {"content": text}, "logprobs": None}], "usage": None}

    assert TextFrame(frame, build).fill(index, text) == frame.fill(build(index, text))


def output_of(text: str, *, finished: bool = False) -> RequestOutput:
    return RequestOutput("r", None, [], [CompletionOutput(0, text, [1])], finished, RequestMetrics(0.0))


class Board:
    def drop(self, request_id: str, feed: OutputFeed) -> None:
        return None


def test_outputs_keep_their_order_and_none_is_told_twice() -> None:
    async def go() -> None:
        feed = OutputFeed(Board(), ["r"])  # type: ignore[arg-type]
        said: list[str] = []
        is_open = True

        def try_tell(position: int, output: RequestOutput) -> bool:
            if is_open:
                said.append(output.outputs[0].text)
            return is_open

        async def iterate() -> None:
            async for _, output in feed:
                said.append(output.outputs[0].text + "*")

        feed.tell_at_once(try_tell)
        feed.put(output_of("a"))  # nobody waits yet
        task = asyncio.create_task(iterate())
        await asyncio.sleep(0)
        feed.put(output_of("b"))
        assert said == ["a*", "b"]  # without a turn of the task
        is_open = False
        feed.put(output_of("c"))
        is_open = True
        feed.put(output_of("d"))  # behind c, which the task has not taken yet
        await asyncio.sleep(0)
        feed.put(output_of("e"))
        feed.put(output_of("f", finished=True))
        feed.put(output_of("g"))
        await task
        assert said == ["a*", "b", "c*", "d*", "e", "f*"]

    asyncio.run(go())


def test_a_bug_in_one_answer_ends_that_one_alone(stand, monkeypatch) -> None:
    """The other request of the same steps gets all its tokens."""
    monkeypatch.setattr("time.time", lambda: 1e9)
    try_event = CompletionAnswer.try_event

    def fail(self: CompletionAnswer, position: int, output: RequestOutput) -> bytes | None:
        if output.request_id == "broken":
            raise ZeroDivisionError
        return try_event(self, position, output)

    monkeypatch.setattr(CompletionAnswer, "try_event", fail)
    answers: list[bytes] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("peername")

        async def ask(name: str) -> bytes:
            own_reader, own_writer = await asyncio.open_connection(*address)
            body = json.dumps({"prompt": "a", "stream": True, "request_id": name}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nConnection: close\r\n"
            own_writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await own_reader.read()
            own_writer.close()
            return answer

        stand.pool.is_held = True
        asking = [asyncio.create_task(ask(name)) for name in ("broken", "whole")]
        while len(stand.pool.running) < 2:
            await asyncio.sleep(0.01)
        while stand.pool.running:
            stand.pool.step()
            await asyncio.sleep(0.01)
        answers.extend(await asyncio.gather(*asking))

    asyncio.run(talk(stand, speak))
    broken, whole = answers
    assert whole.count(b'"text":') > 5 and whole.endswith(b"0\r\n\r\n")
    assert b"[DONE]" not in broken
