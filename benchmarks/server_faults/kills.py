"""Kills: SIGKILL and SIGSTOP for processes of every kind in every phase, and what clients see of it.

Times are from the signal: until ``/health`` says that no engine serves, and until it says that one does again.
Invariant: after every case what was under way has ended with the tokens of offline, each told once.
"""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from benchmarks.server_faults.client import Answer
from benchmarks.server_faults.load import Outcome
from benchmarks.server_faults.questions import Ask, Questions
from benchmarks.server_faults.server import Server

Kind = Literal["api", "engine", "rank", "fork server", "tracker", "spare"]
Phase = Literal["first start", "idle", "prefill", "decode", "starting", "draining"]
PHASES: tuple[Phase, ...] = get_args(Phase)

STUCK_AFTER_S = 3.0
MAX_NOTICED_S = 5.0
MAX_SERVING_S = 10.0
NUM_TOKENS = 100
NUM_REQUESTS = 4
NUM_SUMS_OF_PREFILL = 60  # a prompt that takes several steps
LAYOUTS: dict[str, tuple[str, ...]] = {"one rank": (), "tp 2": ("--tp", "2"), "dp 2": ("--dp", "2")}
HELPERS = ("fork server", "tracker")  # an engine may live on without one


@dataclass(frozen=True, slots=True)
class Case:
    layout: str
    kind: Kind
    phase: Phase
    signal: signal.Signals

    def __str__(self) -> str:
        return f"{self.layout}: {self.signal.name} {self.kind}, {self.phase}"


class Prompts:
    """Made once for all cases."""

    def __init__(self) -> None:
        self._short = Questions(NUM_REQUESTS, NUM_TOKENS, max_sums=4)
        self._long = Questions(NUM_REQUESTS, NUM_TOKENS, max_sums=1, min_sums=NUM_SUMS_OF_PREFILL, seed=1)

    def asks(self, phase: Phase) -> list[Ask]:
        if phase in ("idle", "first start"):
            return []
        questions = self._long if phase == "prefill" else self._short
        return [questions.ask(i, NUM_TOKENS, ignores_eos=True, is_streamed=True) for i in range(NUM_REQUESTS)]


def list_groups() -> Iterator[list[Case]]:
    """The cases, by the server that they share; an engine may end five times in one."""
    for how in (signal.SIGKILL, signal.SIGSTOP):
        for layout, kind in (("one rank", "engine"), ("tp 2", "rank"), ("dp 2", "rank")):
            yield [Case(layout, kind, phase, how) for phase in ("idle", "prefill", "decode")]  # type: ignore[arg-type]
            yield [Case(layout, kind, phase, how) for phase in ("starting", "draining")]  # type: ignore[arg-type]
            yield [Case(layout, kind, "first start", how)]  # type: ignore[arg-type]
        for helper, phase in itertools.product(HELPERS, ("idle", "decode", "draining")):  # they do not come back
            yield [Case("tp 2", helper, phase, how)]  # type: ignore[arg-type]
        yield [Case("one rank", "spare", phase, how) for phase in ("idle", "decode")]  # type: ignore[arg-type]
    for layout in ("one rank", "tp 2"):
        for phase in PHASES:
            yield [Case(layout, "api", phase, signal.SIGKILL)]
    yield [Case("one rank", "api", "decode", signal.SIGSTOP)]


async def run_kills(only: str = "") -> Outcome:
    """``only``: cases whose name contains this."""
    prompts = Prompts()
    results: list[Outcome] = []
    for group in list_groups():
        if cases := [case for case in group if only in str(case)]:
            results += await run_group(cases, prompts)
    failed = [result["case"] for result in results if not result["passed"]]
    return {"scenario": "kills", "passed": not failed, "cases": len(results), "failed": failed, "results": results}


async def run_group(cases: list[Case], prompts: Prompts) -> list[Outcome]:
    """On one server, one after another."""
    flags = ["--stuck-after-s", str(STUCK_AFTER_S), "--max-num-batched-tokens", "256", *LAYOUTS[cases[0].layout]]
    server = Server(*flags, waits=cases[0].phase != "first start")
    results: list[Outcome] = []
    try:
        for case in cases:
            result: Outcome = {"case": str(case), "load average": round(os.getloadavg()[0], 1)}
            try:
                result |= await _run(case, server, prompts)
            except (RuntimeError, TimeoutError, AssertionError, IndexError) as error:
                result |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
            print(f"  {'ok  ' if result['passed'] else 'FAIL'} {result}", flush=True)
            results.append(result)
        is_killed = cases[-1].kind == "api" and cases[-1].signal == signal.SIGKILL  # it may not have been buried yet
        if not is_killed and server.process.poll() is None:
            code, left = server.end()
            results[-1] |= {"exit code": code, "processes left": left}
            results[-1]["passed"] = bool(results[-1]["passed"]) and code == 0 and not left
    finally:
        server.kill()
    return results


async def _run(case: Case, server: Server, prompts: Prompts) -> Outcome:
    if case.phase == "first start":
        return await _end_first_start(case, server)
    asks = prompts.asks(case.phase)
    await server.wait_until_ready()
    if case.phase != "starting" and case.kind != "api":
        await server.wait_for_spare()
    has_spare = server.has_spare
    news: list[list[int]] = [[] for _ in asks]
    tasks = [
        asyncio.create_task(server.endpoint.complete(ask.body, told)) for ask, told in zip(asks, news, strict=True)
    ]
    await _reach(case, server, news)
    victim = (await _wait_for(server, case.kind))[-1]
    serves = (await server.endpoint.get("/health")).status != 503  # with a spare a start is over soon
    at_s = time.monotonic()
    os.kill(victim, case.signal)
    if case.kind == "api":
        return await (_end_api(server, tasks) if case.signal == signal.SIGKILL else _resume_api(server, asks, tasks))
    result: Outcome = {"had a spare": has_spare} | await _measure(case, server, at_s, serves)
    problems = [problem for ask, each in zip(asks, tasks, strict=True) if (problem := ask.judge(await each))]
    if case.phase != "draining":
        ask = prompts.asks("decode")[0]
        if problem := ask.judge(await server.endpoint.complete(ask.body)):
            problems.append(f"afterwards: {problem}")
    else:
        code, left = await asyncio.to_thread(server.wait)
        result |= {"exit code": code, "processes left": left}
        result["passed"] = bool(result["passed"]) and code == 0 and not left
    result["passed"] = bool(result["passed"]) and not problems
    return result | ({"problems": problems[:2]} if problems else {})


async def _reach(case: Case, server: Server, news: list[list[int]]) -> None:
    """The phase."""
    if case.phase == "idle":
        await asyncio.sleep(0.3)
    elif case.phase == "prefill":
        while await server.metric("engine_requests") < len(news):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert not all(news), "the prefill was over already"
    else:
        while not all(len(told) > 4 for told in news):
            await asyncio.sleep(0.01)
    if case.phase == "draining":
        server.processes()
        server.process.send_signal(signal.SIGTERM)
        while (await server.endpoint.get("/ready")).status == 200:
            await asyncio.sleep(0.005)
    elif case.phase == "starting":
        os.kill(server.pids("engine")[0], signal.SIGKILL)
        await server.wait_until_lost()
        await _wait_for(server, case.kind)
        await asyncio.sleep(0.2)


async def _wait_for(server: Server, kind: Kind, limit_s: float = 60.0) -> list[int]:
    """The processes of a kind; of ranks there are two."""
    deadline_s = time.monotonic() + limit_s
    while len(pids := server.pids(kind)) < (2 if kind == "rank" else 1):
        assert time.monotonic() < deadline_s, f"there is no {kind}: {server.processes()}"
        await asyncio.sleep(0.02)
    return pids


async def _measure(case: Case, server: Server, at_s: float, served: bool) -> Outcome:
    """Until it is noticed, and until an engine serves again."""
    result: Outcome = {"passed": True}
    if case.kind in (*HELPERS, "spare"):
        if case.kind != "spare" and case.phase == "idle" and case.signal == signal.SIGSTOP:
            await server.wait_until_lost()
            result["noticed_s"] = round(time.monotonic() - at_s, 2)
            await _wait_until_healthy(server)
        return result | {"an engine's restarts": await server.metric("engine_restarts")}
    max_noticed_s = MAX_NOTICED_S + (0.0 if case.signal == signal.SIGKILL else STUCK_AFTER_S)
    if served:
        await server.wait_until_lost()
        noticed_s = time.monotonic() - at_s
        result |= {"noticed_s": round(noticed_s, 2), "passed": noticed_s <= max_noticed_s}
    await _wait_until_healthy(server)
    serving_s = time.monotonic() - at_s
    limit_s = MAX_SERVING_S + (0.0 if case.signal == signal.SIGKILL else STUCK_AFTER_S)
    return result | {"serving_s": round(serving_s, 2), "passed": result["passed"] and serving_s <= limit_s}


async def _wait_until_healthy(server: Server) -> None:
    """``/health``, because ``/ready`` does not come back while the server drains."""
    deadline_s = time.monotonic() + 60.0
    while (await server.endpoint.get("/health")).status == 503:
        assert time.monotonic() < deadline_s, "no engine came back"
        await asyncio.sleep(0.005)


async def _end_first_start(case: Case, server: Server) -> Outcome:
    """The server says why it cannot start, and ends."""
    victim = server.pid if case.kind == "api" else (await _wait_for(server, case.kind))[-1]
    await asyncio.sleep(0.05 if case.kind == "rank" else 0.5)  # ranks, forked, are ready soon
    server.processes()
    at_s = time.monotonic()
    os.kill(victim, case.signal)
    code, left = await asyncio.to_thread(server.wait)
    wanted = -signal.SIGKILL if case.kind == "api" else 1
    return {
        "passed": code == wanted and not left,
        "ended_s": round(time.monotonic() - at_s, 2),
        "exit code": code,
        "processes left": left,
        "last line": server.lines[-1].strip() if server.lines else "",
    }


async def _end_api(server: Server, tasks: list["asyncio.Task[Answer]"]) -> Outcome:
    """Everything ends with it."""
    at_s = time.monotonic()
    left = await asyncio.to_thread(server.left, MAX_NOTICED_S)
    seconds = time.monotonic() - at_s
    await asyncio.gather(*tasks)
    return {"passed": not left, "all gone after s": round(seconds, 2), "processes left": left}


async def _resume_api(server: Server, asks: list[Ask], tasks: list["asyncio.Task[Answer]"]) -> Outcome:
    """Stopped for longer than an engine may be silent: no engine is to blame for it."""
    await asyncio.sleep(STUCK_AFTER_S + 1.0)
    os.kill(server.pid, signal.SIGCONT)
    problems = [problem for ask, each in zip(asks, tasks, strict=True) if (problem := ask.judge(await each))]
    restarts = await server.metric("engine_restarts")
    return {"passed": not problems and restarts == 0, "problems": problems[:2], "an engine's restarts": restarts}
