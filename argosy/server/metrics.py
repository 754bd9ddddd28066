"""Prometheus metrics: vLLM's names under the prefix ``argosy:``, and what only this server has.

Counters are fed by answers as they leave; gauges are read from the engines' last snapshots when somebody scrapes.
Invariant: no label's values come from a client.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from argosy.messages import RequestOutput

PREFIX = "argosy:"
VLLM_PREFIX = "vllm:"
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_KNOWN_PATHS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize", "/v1/models", "/health"}
    | {"/ready", "/metrics", "/version", "/load", "/tokenizer_info", "/abort_requests"}
)


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": model}

        def counter(name: str, text: str, *names: str) -> Counter:
            return Counter(PREFIX + name, text, ("model_name", *names), registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(PREFIX + name, text, ("model_name",), buckets=buckets, registry=self.registry)
            return metric.labels(**labels)

        self._model = model
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests").labels(**labels)
        self._cached_tokens = counter("prompt_tokens_cached", "Of these, found in the prefix cache").labels(**labels)
        self._generation_tokens = counter("generation_tokens", "Tokens generated").labels(**labels)
        self._successes = counter("request_success", "Completions that ended, by how", "finished_reason")
        self._answers = counter("http_requests", "Answers by path and status", "path", "status")
        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self._inter_token = histogram("inter_token_latency_seconds", "Between outputs of a request, a token", _SECONDS)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token", _SECONDS)
        self._prompt_size = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output_size = histogram("request_generation_tokens", "Generated tokens of a request", _TOKENS)

    def observe_answer(self, path: str, status: int) -> None:
        known = path if path in _KNOWN_PATHS else "other"
        self._answers.labels(model_name=self._model, path=known, status=str(status)).inc()

    def observe_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def observe_tokens(self, num_tokens: int, seconds: float) -> None:
        """``num_tokens`` that came ``seconds`` after the ones before them."""
        if num_tokens:
            self._inter_token.observe(seconds / num_tokens)

    def count_generated(self, num_tokens: int) -> None:
        self._generation_tokens.inc(num_tokens)

    def observe_end(self, output: RequestOutput, reasons: Sequence[str], num_output_tokens: int) -> None:
        for reason in reasons:
            self._successes.labels(model_name=self._model, finished_reason=reason).inc()
        self._prompt_tokens.inc(len(output.prompt_token_ids))
        self._cached_tokens.inc(output.num_cached_tokens)
        self._prompt_size.observe(len(output.prompt_token_ids))
        self._output_size.observe(num_output_tokens)
        if output.metrics.finished_s is not None:
            self._e2e.observe(output.metrics.finished_s - output.metrics.arrival_s)

    def watch_engines(self, read: "EngineReader") -> None:
        self.registry.register(_EngineCollector(self._model, read))

    def render(self, *, with_vllm_names: bool) -> bytes:
        text = generate_latest(self.registry)
        if with_vllm_names:
            text += text.replace(PREFIX.encode(), VLLM_PREFIX.encode())
        return text


class EngineReader(Protocol):
    def __call__(self) -> list[tuple[str, str, dict[str, str], float]]:
        """``(kind, name, labels, value)`` with kind ``gauge`` or ``counter``; a name's labels are always the same."""


class _EngineCollector(Collector):
    def __init__(self, model: str, read: EngineReader) -> None:
        self._model = model
        self._read = read

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for kind, name, labels, value in self._read():
            if name not in families:
                make = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
                text = name.replace("_", " ")
                families[name] = make(PREFIX + name, text, labels=("model_name", *labels))
            families[name].add_metric((self._model, *labels.values()), value)  # type: ignore[attr-defined]
        return families.values()
