"""``argosy bench serve``: load on an OpenAI-compatible endpoint, ours or another; flags named as in vLLM's command.

A card for people, then one JSON line. Invariant: a run in which a request failed says how many and why, and exits
with 1.
"""

import asyncio
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
from rich.table import Table

from argosy.cli.files import check_writable
from argosy.cli.invocation import EXIT_FAILED, EXIT_OK, Invocation
from argosy.cli.terminal import Terminal, show_progress
from argosy.loadtest.records import LABELS, METRICS, RunReport, summarize

Backend = Literal["openai", "openai-chat"]
_ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
MAX_PROMPTS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchServeOptions:
    """Measure a server: send requests and report latencies, throughput and goodput."""

    base_url: str = "http://127.0.0.1:8000"  # of the server
    backend: Backend = "openai"  # openai: completions; openai-chat: chat completions
    endpoint: str | None = None  # path; None = the backend's
    model: str | None = None  # None = the first the server lists
    api_key: str | None = None  # sent as Authorization: Bearer
    num_prompts: int = 200  # requests to send
    request_rate: float = math.inf  # requests a second, on average; inf = all at once
    burstiness: float = 1.0  # 1 = Poisson arrivals, below in bursts, above steadier
    max_concurrency: int | None = None  # requests in flight at most; None = no limit
    random_input_len: int = 128  # words of a prompt, about as many tokens
    random_output_len: int = 64  # tokens to ask for
    random_range_ratio: float = 0.0  # lengths vary by this share either way
    ignore_eos: bool = False  # ask for all tokens, whatever the model says
    temperature: float = 0.0  # 0 = greedy
    num_warmups: int = 1  # requests sent before the measurement
    metric_percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    goodput: tuple[str, ...] = ()  # limits in ms, as ttft:200 tpot:50 e2el:5000
    request_timeout_s: float = 600.0  # without any news of a request
    seed: int = 0  # of prompts and arrivals
    save_result: str | None = None  # write the JSON there too
    plot: str | None = None  # write a picture of the latencies there (needs matplotlib)
    debug: bool = False  # show tracebacks

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_prompts", 1, MAX_PROMPTS),
            ("random_input_len", 1, MAX_PROMPTS),
            ("random_output_len", 1, MAX_PROMPTS),
            ("num_warmups", 0, 1000),
            ("max_concurrency", 1, 100_000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {value}; set --{name.replace('_', '-')}")
        if not self.request_rate > 0:
            raise ValueError(f"request_rate must be above 0, got {self.request_rate}; set --request-rate")
        if not 0 < self.burstiness < math.inf:
            raise ValueError(f"burstiness must be above 0, got {self.burstiness}; set --burstiness")
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(
                f"random_range_ratio must be in [0, 1), got {self.random_range_ratio}; set --random-range-ratio"
            )
        if not self.metric_percentiles or not all(0 <= percent <= 100 for percent in self.metric_percentiles):
            raise ValueError(
                f"percentiles must be in [0, 100], got {self.metric_percentiles}; set --metric-percentiles"
            )
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}; set --base-url")
        read_limits(self.goodput)


def read_limits(texts: tuple[str, ...]) -> dict[str, float]:
    """``("ttft:200",)`` -> ``{"ttft": 200.0}``, in milliseconds."""
    limits = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in METRICS or not limit > 0:
            raise ValueError(
                f"goodput takes NAME:MS with NAME one of {', '.join(METRICS)}, got {text!r}; set --goodput"
            )
        limits[name] = limit
    return limits


def run_bench_serve(options: BenchServeOptions, invocation: Invocation) -> int:
    check_writable("--save-result", options.save_result)
    check_writable("--plot", options.plot)
    terminal = invocation.terminal
    try:
        report = asyncio.run(_measure(options, terminal))
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is missing; install the extra: pip install 'argosy[bench]'") from error
    _print_card(report, options, terminal)
    line = msgspec.json.encode({"command": invocation.arguments, **_as_dict(report)}).decode()
    print(line, file=terminal.stdout)
    if options.save_result:
        Path(options.save_result).write_text(line + "\n", encoding="utf-8")
    return EXIT_FAILED if report.errors else EXIT_OK


async def _measure(options: BenchServeOptions, terminal: Terminal) -> RunReport:
    from argosy.loadtest.client import Target, run_load
    from argosy.loadtest.workload import arrival_gaps_s, draw_requests

    rng = random.Random(options.seed)
    target = Target(
        url=options.base_url.rstrip("/") + (options.endpoint or _ENDPOINTS[options.backend]),
        model=options.model or await _find_model(options),
        is_chat=options.backend == "openai-chat",
        api_key=options.api_key,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        timeout_s=options.request_timeout_s,
    )
    lengths = (options.random_input_len, options.random_output_len, options.random_range_ratio)
    requests = draw_requests(rng, options.num_prompts + options.num_warmups, *lengths)
    warm_up, requests = requests[: options.num_warmups], requests[options.num_warmups :]
    records, _ = await run_load(target, warm_up, arrival_gaps_s(rng, math.inf, 1.0), 1, lambda: None)
    if warm_up and not any(record.is_complete for record in records):
        raise RuntimeError(f"{target.url} answers no request: {records[0].error or 'no text came'}")
    with show_progress(terminal, "requests", len(requests)) as progress:
        gaps_s = arrival_gaps_s(rng, options.request_rate, options.burstiness)
        records, duration_s = await run_load(target, requests, gaps_s, options.max_concurrency, progress.advance)
    if options.plot:
        from argosy.loadtest.plot import plot_latencies

        plot_latencies(records, options.plot)
    return summarize(records, duration_s, options.metric_percentiles, read_limits(options.goodput))


async def _find_model(options: BenchServeOptions) -> str:
    import httpx

    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    url = options.base_url.rstrip("/") + "/v1/models"
    try:
        async with httpx.AsyncClient(headers=headers, timeout=10.0, trust_env=False) as client:
            response = await client.get(url)
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(
            f"{url} names no model ({error or type(error).__name__}); is the server up? set --base-url, or --model"
        ) from error


def _print_card(report: RunReport, options: BenchServeOptions, terminal: Terminal) -> None:
    table = Table(title=f"{options.base_url}: {report.num_completed} of {options.num_prompts} requests completed")
    table.add_column("ms")
    table.add_column("mean", justify="right")
    for percent in options.metric_percentiles:
        table.add_column(f"p{percent:g}", justify="right")
    for metric, summary in report.summaries.items():
        values = [summary.mean, *summary.percentiles.values()]
        table.add_row(f"{LABELS[metric]} ({metric})", *(f"{value:.2f}" for value in values))
    console = terminal.table_console()
    console.print(table)
    good = "" if report.goodput is None else f", goodput {report.goodput:.2f} requests/s"
    console.print(
        f"{report.duration_s:.2f} s, {report.request_throughput:.2f} requests/s, "
        f"{report.output_throughput:.1f} output tokens/s, {report.total_throughput:.1f} tokens/s, "
        f"at most {report.peak_concurrency} at once{good}"
    )
    for error, count in report.errors.items():
        console.print(f"{count} failed: {error}", markup=False)


def _as_dict(report: RunReport) -> dict[str, object]:
    rates = {name: getattr(report, f"{name}_throughput") for name in ("request", "output", "total")}
    summaries = {
        metric: {"mean_ms": summary.mean} | {f"p{percent:g}_ms": ms for percent, ms in summary.percentiles.items()}
        for metric, summary in report.summaries.items()
    }
    return asdict(report) | {"summaries": summaries} | {f"{name}_throughput": rate for name, rate in rates.items()}
