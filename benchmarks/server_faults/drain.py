"""Drain: signals to a server under load. What was accepted is finished, later requests are refused, nothing is left."""

import asyncio
import signal
import time

from benchmarks.server_faults.client import Answer
from benchmarks.server_faults.load import Outcome
from benchmarks.server_faults.questions import Ask, Questions
from benchmarks.server_faults.server import Server

NUM_TOKENS = 120


async def run_drain(num_requests: int = 32) -> Outcome:
    questions = Questions(24, NUM_TOKENS, max_sums=4)
    asks = [questions.ask(i, NUM_TOKENS, ignores_eos=True, is_streamed=i % 2 > 0) for i in range(num_requests)]
    cases = [await _drain(asks, how) for how in (signal.SIGTERM, signal.SIGINT)] + [await _hurry(asks)]
    return {
        "scenario": "drain",
        "passed": all(case["passed"] for case in cases),
        "requests under way": num_requests,
        **{str(case.pop("case")): case for case in cases},
    }


async def _drain(asks: list[Ask], how: signal.Signals) -> Outcome:
    server = Server("--log-level", "warning")
    try:
        answers = await start_all(server, asks)
        server.processes()
        server.process.send_signal(how)
        started_s = time.monotonic()
        await _wait_for_refusal(server)
        refused_s = time.monotonic() - started_s
        late = await server.endpoint.complete(asks[0].body)
        problems = [problem for ask, each in zip(asks, answers, strict=True) if (problem := ask.judge(await each))]
        code, left = await asyncio.to_thread(server.wait)
    finally:
        server.kill()
    is_refused = late.status in (0, 503)  # 0: nobody listens any more
    return {
        "case": how.name,
        "passed": not problems and code == 0 and not left and is_refused,
        "refuses new ones after s": round(refused_s, 3),
        "a new one": late.status or "no connection",
        "wrong answers": len(problems),
        "first problems": problems[:3],
        "exit code": code,
        "processes left": left,
    }


async def _hurry(asks: list[Ask]) -> Outcome:
    """A second signal, a while after the first: what is unfinished is cut off, and told so."""
    server = Server("--log-level", "warning")
    try:
        answers = await start_all(server, asks)
        server.processes()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.2)
        server.process.send_signal(signal.SIGTERM)
        started_s = time.monotonic()
        code, left = await asyncio.to_thread(server.wait)
        seconds = time.monotonic() - started_s
        told = [await each for each in answers]
    finally:
        server.kill()
    cut = sum("shut down" in answer.problem for answer in told)
    others = [problem for ask, each in zip(asks, told, strict=True) if (problem := ask.judge(each))]
    lost = [problem for problem in others if "shut down" not in problem]
    return {
        "case": "SIGTERM twice",
        "passed": code == (1 if cut else 0) and not left and not lost,
        "ended after s": round(seconds, 2),
        "told that they were cut off": cut,
        "lost without a word": len(lost),
        "exit code": code,
        "processes left": left,
    }


async def start_all(server: Server, asks: list[Ask]) -> list["asyncio.Task[Answer]"]:
    """Returns when the server has them all."""
    tasks = [asyncio.create_task(server.endpoint.complete(ask.body)) for ask in asks]
    deadline_s = time.monotonic() + 60.0
    while await server.metric("engine_requests") < len(asks):
        assert time.monotonic() < deadline_s, "the server never had all requests at once"
        await asyncio.sleep(0.02)
    return tasks


async def _wait_for_refusal(server: Server) -> None:
    while (await server.endpoint.get("/ready")).status == 200:
        await asyncio.sleep(0.005)
