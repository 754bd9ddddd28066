"""Overload: requests come three times as fast as they can be served; what is too much is told so at once.

Invariant: the latency of accepted requests is compared within one run, with the same server just full.
"""

import asyncio
import statistics
import time

from benchmarks.server_faults.client import Answer
from benchmarks.server_faults.load import Outcome, ask_all
from benchmarks.server_faults.questions import Ask, Questions
from benchmarks.server_faults.server import Server

NUM_RUNNING = 8
NUM_QUEUED = 8
NUM_TOKENS = 24
MAX_REFUSAL_S = 0.05
MAX_SLOWDOWN = 1.5
FACTOR = 3


async def run_overload(num_requests: int = 600) -> Outcome:
    """``num_requests`` in the overload; a third of them, all accepted, before it."""
    questions = Questions(24, NUM_TOKENS, max_sums=3)
    server = Server(
        *("--max-num-seqs", str(NUM_RUNNING), "--max-num-queued-reqs", str(NUM_QUEUED), "--log-level", "warning")
    )
    try:
        asks = [questions.ask(i, NUM_TOKENS, ignores_eos=True, is_streamed=True) for i in range(num_requests)]
        capacity = NUM_RUNNING + NUM_QUEUED
        await ask_all(server, asks[: 2 * capacity], capacity)  # warm-up
        started_s = time.monotonic()
        full, problems = await ask_all(server, asks[: num_requests // FACTOR], capacity)
        rate = len(full) / (time.monotonic() - started_s)
        answers = await _ask_at_rate(server, asks, FACTOR * rate)
        code, left = server.end()
    finally:
        server.kill()
    refused = [answer for answer in answers if answer.status == 503]
    accepted = [answer for answer in answers if answer.status == 200]
    for i, answer in enumerate(answers):
        if answer.status != 503 and (problem := asks[i].judge(answer)):
            problems.append(f"request {i}: {problem}")
    without_hint = sum(answer.retry_after is None for answer in refused)
    refusal_p99_s = _percentile([answer.total_s for answer in refused], 0.99)
    slowdown = _median(accepted) / _median(full)
    return {
        "scenario": "overload",
        "passed": not problems
        and not without_hint
        and len(refused) > 0
        and refusal_p99_s <= MAX_REFUSAL_S
        and slowdown <= MAX_SLOWDOWN
        and code == 0
        and not left,
        "requests/s when full": round(rate, 1),
        "requests/s in the overload": round(FACTOR * rate, 1),
        "accepted": len(accepted),
        "refused": len(refused),
        "refused without Retry-After": without_hint,
        "refusal ms p50": round(1e3 * statistics.median(answer.total_s for answer in refused), 1),
        "refusal ms p99": round(1e3 * refusal_p99_s, 1),
        "latency s when full": round(_median(full), 3),
        "latency s in the overload": round(_median(accepted), 3),
        "latency ratio, p50": round(slowdown, 2),
        "latency ratio, p95": round(
            _percentile([answer.total_s for answer in accepted], 0.95)
            / _percentile([answer.total_s for answer in full], 0.95),
            2,
        ),
        "wrong answers": len(problems),
        "first problems": problems[:3],
        "exit code": code,
        "processes left": left,
    }


async def _ask_at_rate(server: Server, asks: list[Ask], rate: float) -> list[Answer]:
    tasks = []
    due_s = time.monotonic()
    for ask in asks:
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        tasks.append(asyncio.create_task(server.endpoint.complete(ask.body)))
        due_s += 1 / rate
    return list(await asyncio.gather(*tasks))


def _median(answers: list[Answer]) -> float:
    return statistics.median(answer.total_s for answer in answers)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
