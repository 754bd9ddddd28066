"""Load: many requests, a number of them at a time, of mixed lengths, half of them streams; and the memory it leaves."""

import asyncio
import time
from collections.abc import Callable

from benchmarks.server_faults.client import Answer
from benchmarks.server_faults.questions import Ask, Questions
from benchmarks.server_faults.server import Server, memory_mib, num_files, num_threads

Outcome = dict[str, object]


async def ask_all(
    server: Server, asks: list[Ask], concurrency: int, on_answer: Callable[[], None] = lambda: None
) -> tuple[list[Answer], list[str]]:
    """The answers, and what is wrong with any."""
    waiting = iter(enumerate(asks))
    answers: list[Answer] = [Answer()] * len(asks)
    problems: list[str] = []

    async def work() -> None:
        for i, ask in waiting:
            answers[i] = await server.endpoint.complete(ask.body)
            if problem := ask.judge(answers[i]):
                problems.append(f"request {i}: {problem}")
            on_answer()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return answers, problems


def mix(questions: Questions, number: int, max_tokens: int) -> list[Ask]:
    lengths = [1 + (i * 7) % max_tokens for i in range(number)]
    return [questions.ask(i, lengths[i], ignores_eos=i % 3 > 0, is_streamed=i % 2 > 0) for i in range(number)]


async def run_load(num_requests: int = 2000, concurrency: int = 64, max_tokens: int = 40) -> Outcome:
    asks = mix(Questions(60, max_tokens), num_requests, max_tokens)
    server = Server("--log-level", "warning")
    try:
        started_s = time.monotonic()
        _, problems = await ask_all(server, asks, concurrency)
        seconds = time.monotonic() - started_s
        code, left = server.end()
    finally:
        server.kill()
    return {
        "scenario": "load",
        "passed": not problems and code == 0 and not left,
        "requests": num_requests,
        "at a time": concurrency,
        "tokens": sum(len(ask.token_ids) for ask in asks),
        "seconds": round(seconds, 1),
        "wrong answers": len(problems),
        "first problems": problems[:3],
        "exit code": code,
        "processes left": left,
    }


async def run_leaks(num_requests: int = 10000, concurrency: int = 32, num_samples: int = 20) -> Outcome:
    """Flat: what the last fifth needs, compared with what was needed after the first."""
    asks = mix(Questions(60, 8, max_sums=4), num_requests, 8)
    server = Server("--log-level", "warning", "--spare-engines", "0")
    samples: list[dict[str, float]] = []
    problems: list[str] = []
    try:
        part = num_requests // num_samples
        for start in range(0, num_requests, part):
            problems += (await ask_all(server, asks[start : start + part], concurrency))[1]
            samples.append(await _sample(server))
        code, left = server.end()
    finally:
        server.kill()
    fifth = max(1, num_samples // 5)
    growth = {
        name: round(_mean(samples[-fifth:], name) - _mean(samples[fifth : 2 * fifth], name), 2) for name in samples[0]
    }
    allowed = {"api MiB": 2.0 + 0.0002 * num_requests, "engine MiB": 4.0 + 0.0004 * num_requests}
    return {
        "scenario": "leaks",
        "passed": not problems and code == 0 and all(growth[name] <= allowed.get(name, 0.0) for name in growth),
        "requests": num_requests,
        "growth": growth,
        "samples": samples[:: max(1, num_samples // 10)] + samples[-1:],
        "wrong answers": len(problems),
        "first problems": problems[:3],
        "exit code": code,
        "processes left": left,
    }


async def _sample(server: Server) -> dict[str, float]:
    """Of a server that has nothing to do."""
    await asyncio.sleep(1.2)  # two heartbeats
    (engine,) = server.pids("engine")
    return {
        "api MiB": round(memory_mib(server.pid), 1),
        "engine MiB": round(memory_mib(engine), 1),
        "api files": num_files(server.pid),
        "engine files": num_files(engine),
        "api threads": num_threads(server.pid),
        "engine threads": num_threads(engine),
        "completions": await server.metric("engine_requests"),
        "blocks used": await server.metric('cache_blocks state="used"'),
    }


def _mean(samples: list[dict[str, float]], name: str) -> float:
    return sum(sample[name] for sample in samples) / len(samples)
