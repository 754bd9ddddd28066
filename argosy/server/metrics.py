"""Prometheus metrics of requests and answers: vLLM's names under the prefix ``argosy:``, and what only this server has.

Counters are fed by answers as they leave; what engines tell of themselves is in ``engine_metrics.py``. Invariant: no
label's values come from a client, so the number of series is bounded.
"""

import platform
from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from argosy.server.records import RequestRecord

PREFIX = "argosy:"
VLLM_PREFIX = "vllm:"
FINISH_REASONS = ("stop", "length", "abort", "error")
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75)
_SECONDS = (*_SHORT, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_FEW = (1, 2, 4, 8, 16, 32, 64, 128)
_KNOWN_PATHS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize", "/v1/models", "/health"}
    | {"/ready", "/metrics", "/version", "/load", "/tokenizer_info", "/abort_requests", "/deployment", "/"}
)
# Older vLLM called these so, and dashboards still do.
_OLD_VLLM_NAMES = {
    "inter_token_latency_seconds": "time_per_output_token_seconds",
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
}


class ServerMetrics:
    """All metrics of one server, in registries of their own."""

    def __init__(self, model: str, version: str = "") -> None:
        self.model = model
        self.registry = CollectorRegistry()
        self._process_registry = CollectorRegistry()  # its names are everybody's, without a prefix
        ProcessCollector(registry=self._process_registry)
        labels = {"model_name": model}

        def counter(name: str, text: str, *names: str) -> Counter:
            return Counter(PREFIX + name, text, ("model_name", *names), registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(PREFIX + name, text, ("model_name",), buckets=buckets, registry=self.registry)
            return metric.labels(**labels)

        self.num_generated = 0  # tokens, as the counter below
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got a token").labels(**labels)
        self._cached_tokens = counter("prompt_tokens_cached", "Of these, found in the prefix cache").labels(**labels)
        self._generation_tokens = counter("generation_tokens", "Tokens generated").labels(**labels)
        successes = counter("request_success", "Completions that ended, by how", "finished_reason")
        self._successes = {reason: successes.labels(**labels, finished_reason=reason) for reason in FINISH_REASONS}
        self._answers = counter("http_requests", "Answers by path and status", "path", "status")
        self._answers_by: dict[tuple[str, int], Counter] = {}
        self._inter_token = TokenTimes(model)
        self.registry.register(self._inter_token)
        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token", _SECONDS)
        self._queue = histogram(
            "request_queue_time_seconds", "From the engine's knowing it to its first step", _SECONDS
        )
        self._prefill = histogram("request_prefill_time_seconds", "From the first step to the first token", _SECONDS)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last", _SECONDS)
        self._inference = histogram("request_inference_time_seconds", "Prefill and decode together", _SECONDS)
        self._mean_token = histogram(
            "request_time_per_output_token_seconds", "Decode time of a request by its tokens but the first", _SECONDS
        )
        self._prompt_size = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output_size = histogram("request_generation_tokens", "Generated tokens of a request", _TOKENS)
        self._longest_output = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest completion", _TOKENS
        )
        self._computed_size = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request without the cached ones", _TOKENS
        )
        self._params_n = histogram("request_params_n", "The parameter n of a request", _FEW)
        self._params_max_tokens = histogram("request_params_max_tokens", "The parameter max_tokens", _TOKENS)
        build = Gauge(PREFIX + "build_info", "What runs: 1", ("version", "python_version"), registry=self.registry)
        build.labels(version, platform.python_version()).set(1)

    def observe_answer(self, path: str, status: int) -> None:
        key = (path if path in _KNOWN_PATHS else "other", status)
        if key not in self._answers_by:
            self._answers_by[key] = self._answers.labels(model_name=self.model, path=key[0], status=str(status))
        self._answers_by[key].inc()

    def observe_first_token(self, seconds: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._cached_tokens.inc(num_cached_tokens)

    def observe_tokens(self, num_tokens: int, seconds: float) -> None:
        """``num_tokens`` that came ``seconds`` after the ones before them."""
        self._inter_token.observe(seconds / num_tokens)

    def count_generated(self, num_tokens: int) -> None:
        self.num_generated += num_tokens
        self._generation_tokens.inc(num_tokens)

    def observe_end(self, record: RequestRecord) -> None:
        for reason in record.finish_reasons:
            self._successes[reason].inc()
        if "abort" in record.finish_reasons or record.finished_s is None:
            return
        self._prompt_size.observe(record.num_prompt_tokens)
        self._computed_size.observe(record.num_prompt_tokens - record.num_cached_tokens)
        self._output_size.observe(record.num_output_tokens)
        self._longest_output.observe(record.longest_output)
        self._params_n.observe(record.params.n)
        if record.params.max_tokens is not None:
            self._params_max_tokens.observe(record.params.max_tokens)
        self._e2e.observe(record.finished_s - record.arrival_s)
        if record.first_token_s is None:
            return
        decode_s = record.finished_s - record.first_token_s
        self._queue.observe(record.queued_s)
        self._prefill.observe(record.prefill_s)
        self._decode.observe(decode_s)
        self._inference.observe(record.prefill_s + decode_s)
        if record.longest_output > 1:
            self._mean_token.observe(decode_s / (record.longest_output - 1))

    def watch_engines(self, engines: Collector) -> None:
        self.registry.register(engines)

    def render(self, *, with_vllm_names: bool) -> bytes:
        text = generate_latest(self.registry)
        if with_vllm_names:
            aliases = text.replace(PREFIX.encode(), VLLM_PREFIX.encode())
            text += aliases + _rename(aliases)
        return text + generate_latest(self._process_registry)


class TokenTimes(Collector):
    """The histogram of times between tokens. prometheus_client's own takes a lock and walks all buckets a token."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> list[HistogramMetricFamily]:
        text = "Between outputs of a request, a token"
        family = HistogramMetricFamily(PREFIX + "inter_token_latency_seconds", text, labels=("model_name",))
        family.add_metric((self._model,), buckets=cumulate(_SECONDS, self._counts), sum_value=self._sum_s)
        return [family]


def cumulate(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """``counts`` has one more place, for what is above all bounds."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def _rename(aliases: bytes) -> bytes:
    """The lines of metrics that older vLLM called otherwise, under those names."""
    lines = []
    for line in aliases.splitlines(keepends=True):
        for name, old_name in _OLD_VLLM_NAMES.items():
            full_name = f"{VLLM_PREFIX}{name}".encode()
            if full_name in line:
                lines.append(line.replace(full_name, f"{VLLM_PREFIX}{old_name}".encode()))
    return b"".join(lines)
