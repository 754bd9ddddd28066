"""Long lists of log probabilities are written in pieces, between which others have their turn, and say the same."""

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import pytest

from argosy.messages import TokenLogprobs
from argosy.server import logprobs, streaming
from argosy.server.logprobs import (
    PIECE_SIZE,
    describe_logprobs,
    describe_prompt_logprobs,
    write_entries,
    write_logprobs,
    write_prompt_logprobs,
)

NUM_TOP = 20
LENGTHS = [1, PIECE_SIZE // (1 + NUM_TOP), PIECE_SIZE // (1 + NUM_TOP) + 1, 2000]
CHAT = {"messages": [{"role": "user", "content": "42 " * 600}], "prompt_logprobs": NUM_TOP}
REQUESTS = {
    "prompt_logprobs": ("/v1/completions", {"prompt": [7] * 2000, "prompt_logprobs": NUM_TOP, "n": 2}),
    "echo": ("/v1/completions", {"prompt": [7] * 2000, "echo": True, "logprobs": NUM_TOP}),
    "chat": ("/v1/chat/completions", CHAT),
    "generate": ("/generate", {"prompt_token_ids": [7] * 2000, "prompt_logprobs": NUM_TOP}),
}


def build_entries(num_tokens: int) -> list[TokenLogprobs | None]:
    top_ids = list(range(100, 100 + NUM_TOP))
    tops = [-0.25 * i for i in range(NUM_TOP)]
    return [None, *(TokenLogprobs(300 + i % 50, -1.5 * i, 30, top_ids, tops) for i in range(1, num_tokens))]


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_what_is_written_in_pieces_is_what_is_described_at_once(tokenizer, num_tokens: int) -> None:
    entries = build_entries(num_tokens)
    ids, offsets = [300] * num_tokens, list(range(num_tokens))

    async def go() -> list[bytes]:
        columns = await write_logprobs(tokenizer, ids, entries, iter(offsets), NUM_TOP)
        whole = [await write_prompt_logprobs(tokenizer, entries, NUM_TOP), await write_entries(entries)]
        return [streaming._encode(each) for each in (columns, *whole)]

    described = describe_logprobs(tokenizer, ids, entries, offsets, NUM_TOP)
    expected = [described, describe_prompt_logprobs(tokenizer, entries, NUM_TOP), entries]
    assert asyncio.run(go()) == [streaming._encode(each) for each in expected]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", REQUESTS)
def test_others_have_their_turn_between_the_pieces(stand, monkeypatch, kind: str, stream: bool) -> None:
    """What is described or encoded in one turn of the loop is bounded, whatever an answer's length."""
    since_turn, most = [0], [0]

    def count(function: Callable, size_of: Callable[..., int]) -> Callable:
        def counted(*arguments: object) -> object:
            since_turn[0] += size_of(*arguments)
            most[0] = max(most[0], since_turn[0])
            return function(*arguments)

        return counted

    def length(payload: object, *_: object) -> int:
        """Numbers in a payload that are not written yet."""
        if isinstance(payload, dict):
            return sum(map(length, payload.values()))
        if isinstance(payload, (list, tuple)):
            return sum(map(length, payload))
        return 1 + len(payload.top_logprobs) if isinstance(payload, TokenLogprobs) else isinstance(payload, float)

    monkeypatch.setattr(logprobs, "_encode", count(logprobs._encode, length))
    monkeypatch.setattr(streaming, "_encode", count(streaming._encode, length))

    async def go() -> httpx.Response:
        async with stand.client() as client:
            path, body = REQUESTS[kind]
            asking = asyncio.create_task(client.post(path, json=body | {"stream": stream}))
            while not asking.done():
                since_turn[0] = 0
                await asyncio.sleep(0)
            return asking.result()

    answer = asyncio.run(go())
    assert answer.status_code == 200 and len(answer.content) > 100_000
    assert 0 < most[0] <= PIECE_SIZE


def test_the_loop_runs_on_while_log_probabilities_are_written(tokenizer) -> None:
    """Its longest pause is a small part of the whole work."""
    entries = build_entries(2**17 // (1 + NUM_TOP))

    async def go() -> tuple[float, float]:
        work = asyncio.create_task(write_prompt_logprobs(tokenizer, entries, NUM_TOP))
        start_s = last_s = time.perf_counter()
        longest_s = 0.0
        while not work.done():
            await asyncio.sleep(0)
            now_s = time.perf_counter()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s
        assert len(json.loads(bytes(work.result()))) == len(entries)
        return longest_s, last_s - start_s

    pauses = [longest_s / all_s for longest_s, all_s in (asyncio.run(go()) for _ in range(3))]
    assert min(pauses) < 0.2
