"""Sends a workload and notes when what came. One event loop; a request in flight is one task.

Open loop: requests are sent at their times, however slow the answers are. ``max_concurrency`` closes the loop: a
request waits until fewer are in flight, and its clock starts when it is sent. Invariant: every request gets a record,
also when the endpoint dies.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx

from argosy.loadtest.records import RequestRecord
from argosy.loadtest.workload import LoadRequest

_DONE = "[DONE]"
_MAX_ERROR_CHARS = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """An endpoint. ``is_chat``: its bodies have messages."""

    url: str
    model: str
    is_chat: bool
    api_key: str | None
    ignore_eos: bool
    temperature: float
    timeout_s: float

    def body(self, request: LoadRequest) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": request.num_output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.is_chat:
            return body | {"messages": [{"role": "user", "content": request.prompt}]}
        return body | {"prompt": request.prompt}


async def run_load(
    target: Target,
    requests: Sequence[LoadRequest],
    gaps_s: Iterator[float],
    max_concurrency: int | None,
    on_end: Callable[[], None],
) -> tuple[list[RequestRecord], float]:
    """Records in the order of sending, and the seconds until the last one ended."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    records: list[RequestRecord] = []
    async with httpx.AsyncClient(limits=limits, headers=headers, timeout=target.timeout_s, trust_env=False) as client:
        started_s = time.perf_counter()

        async def send(request: LoadRequest) -> None:
            try:
                record = RequestRecord(len(request.prompt.split()), time.perf_counter() - started_s)
                records.append(record)
                await _send(client, target, request, record, started_s)
                record.ended_s = time.perf_counter() - started_s
            finally:
                if gate is not None:
                    gate.release()
                on_end()

        tasks = []
        due_s = time.perf_counter()
        for request in requests:
            if gate is not None:
                await gate.acquire()
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(send(request)))
            due_s = max(due_s, time.perf_counter()) + next(gaps_s) if gate else due_s + next(gaps_s)
        await asyncio.gather(*tasks)
        return records, time.perf_counter() - started_s


async def _send(
    client: httpx.AsyncClient, target: Target, request: LoadRequest, record: RequestRecord, started_s: float
) -> None:
    try:
        async with client.stream("POST", target.url, json=target.body(request)) as response:
            record.status = response.status_code
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                record.error = f"HTTP {response.status_code}: {_shorten(text)}"
                return
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    _take_event(line[5:].strip(), target, record, time.perf_counter() - started_s)
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        record.error = type(error).__name__


def _take_event(data: str, target: Target, record: RequestRecord, now_s: float) -> None:
    if data == _DONE:
        return
    event = json.loads(data)
    if "error" in event:
        record.error = f"in the stream: {_shorten(json.dumps(event['error']))}"
        return
    if usage := event.get("usage"):
        record.num_output_tokens = usage["completion_tokens"]
        record.num_prompt_tokens = usage["prompt_tokens"]
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        text = (delta.get("content") or delta.get("reasoning_content")) if target.is_chat else choice.get("text")
        if text:
            record.output_times_s.append(now_s)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_ERROR_CHARS else text[: _MAX_ERROR_CHARS - 3] + "..."
