"""Disconnects: clients that leave at every stage of a request, beside neighbours who stay and must not notice.

Invariant: every stage is left equally often, so a run that passes has left them all.
"""

import asyncio
import socket
import struct
import time
from typing import Literal, get_args

from benchmarks.server_faults.client import build_request
from benchmarks.server_faults.load import Outcome
from benchmarks.server_faults.questions import Ask, Questions
from benchmarks.server_faults.server import Server

Stage = Literal["connected", "half a header", "half a body", "sent", "waiting", "first token", "mid-stream"]
STAGES: tuple[Stage, ...] = get_args(Stage)
NUM_RUNNING = 16  # fewer than there are clients, so that some leave while they wait
NUM_TOKENS = 200
MAX_BLOCKS_S = 1.0


async def run_disconnects(num_clients: int = 1000, concurrency: int = 48, num_neighbours: int = 4) -> Outcome:
    questions = Questions(24, NUM_TOKENS)
    server = Server("--max-num-seqs", str(NUM_RUNNING), "--log-level", "warning")
    problems: list[str] = []
    num_neighbour_answers = 0
    are_leaving = True

    async def stay(number: int) -> None:
        nonlocal num_neighbour_answers
        while are_leaving:
            ask = questions.ask(number, 60, ignores_eos=True, is_streamed=number % 2 > 0)
            if problem := ask.judge(await server.endpoint.complete(ask.body)):
                problems.append(f"neighbour {number}: {problem}")
            num_neighbour_answers += 1
            number += num_neighbours

    async def leave_all(numbers: range) -> None:
        waiting = iter(numbers)

        async def work() -> None:
            for i in waiting:
                ask = questions.ask(i, NUM_TOKENS, ignores_eos=True, is_streamed=i % 3 > 0)
                await leave(server, ask, STAGES[i % len(STAGES)], is_rude=i % 2 > 0)

        await asyncio.gather(*(work() for _ in range(concurrency)))

    try:
        await server.endpoint.complete(questions.ask(0, 4, ignores_eos=True, is_streamed=False).body)
        neighbours = [asyncio.create_task(stay(i)) for i in range(num_neighbours)]
        await leave_all(range(num_clients - concurrency))
        are_leaving = False
        await asyncio.gather(*neighbours)
        await leave_all(range(num_clients - concurrency, num_clients))
        blocks_s = await _wait_for_no_blocks(server)
        completions = await server.metric("engine_requests")
        ask = questions.ask(1, NUM_TOKENS, ignores_eos=True, is_streamed=True)
        if problem := ask.judge(await server.endpoint.complete(ask.body)):
            problems.append(f"afterwards: {problem}")
        code, left = server.end()
    finally:
        server.kill()
    return {
        "scenario": "disconnects",
        "passed": not problems and blocks_s <= MAX_BLOCKS_S and completions == 0 and code == 0 and not left,
        "clients that left": num_clients,
        "stages": ", ".join(STAGES),
        "blocks free after s": round(blocks_s, 2),
        "completions left": completions,
        "neighbours' answers": num_neighbour_answers,
        "wrong answers": len(problems),
        "first problems": problems[:3],
        "exit code": code,
        "processes left": left,
    }


async def leave(server: Server, ask: Ask, stage: Stage, *, is_rude: bool) -> None:
    """Rude: with a reset instead of an end."""
    reader, writer = await asyncio.open_connection(server.endpoint.host, server.endpoint.port)
    try:
        request = build_request(ask.body | ({"stream": True} if stage in ("first token", "mid-stream") else {}))
        head_size = request.index(b"\r\n\r\n") + 4
        sizes = {"connected": 0, "half a header": head_size // 2, "half a body": (head_size + len(request)) // 2}
        writer.write(request[: sizes.get(stage, len(request))])
        await writer.drain()
        if stage == "waiting":
            await asyncio.sleep(0.2)
        elif stage == "first token":
            await reader.readuntil(b"data: ")
        elif stage == "mid-stream":
            for _ in range(10):
                await reader.readuntil(b"data: ")
    finally:
        if is_rude:
            link = writer.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()


async def _wait_for_no_blocks(server: Server) -> float:
    started_s = time.monotonic()
    while await server.metric('cache_blocks state="used"'):
        if time.monotonic() - started_s > 30.0:
            break
        await asyncio.sleep(0.01)
    return time.monotonic() - started_s
