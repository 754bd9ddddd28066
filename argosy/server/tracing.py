"""OpenTelemetry traces: one span a prompt, written when it is over, with vLLM's and the ``gen_ai`` attribute names.

The packages are the extra ``otel``, imported only when traces are asked for. Spans leave in a thread of the exporter's
own; when the collector does not take them they are dropped. Invariant: no text, token or key is ever in a span.
"""

import time
from importlib import import_module, util
from urllib.parse import urlsplit, urlunsplit

from argosy.server.records import NoTracer, RequestRecord, Tracer

_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_DEFAULT_PATH = "/v1/traces"  # where collectors listen
SPAN_NAME = "llm_request"


def build_tracer(endpoint: str | None, model: str, version: str) -> Tracer:
    """``endpoint``: a collector's URL; None = no traces.

    Raises:
        ValueError: the extra is not installed.
    """
    if endpoint is None:
        return NoTracer()
    check_installed(endpoint, _PACKAGES)
    writer: Tracer = import_module("argosy.server.tracing_otel").SpanWriter.to_collector(
        complete_url(endpoint), model, version
    )
    return writer


def check_installed(endpoint: str, packages: tuple[str, ...]) -> None:
    """Raises ValueError: one of ``packages`` is missing."""
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise ValueError(
            f"otlp_traces_endpoint ({endpoint!r}) asks for traces, which need the package of {missing[0]}; "
            "install argosy's extra: pip install 'argosy[otel]', or leave --otlp-traces-endpoint out"
        )


def complete_url(endpoint: str) -> str:
    """With the usual path, if it has none."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(path=_DEFAULT_PATH)) if parts.path in ("", "/") else endpoint


def describe(record: RequestRecord, model: str) -> dict[str, str | int | float | tuple[str, ...]]:
    """A span's attributes; what is not known is left out."""
    params = record.params
    attributes: dict[str, str | int | float | tuple[str, ...] | None] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.n": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.usage.num_sequences": params.n,
        "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": record.num_output_tokens,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "gen_ai.usage.cached_tokens": record.num_cached_tokens,
        "gen_ai.response.finish_reasons": record.finish_reasons,
    }
    if record.first_token_s is not None:
        attributes["gen_ai.latency.time_in_queue"] = record.queued_s
        attributes["gen_ai.latency.time_to_first_token"] = record.first_token_s - record.arrival_s
        attributes["gen_ai.latency.time_in_model_prefill"] = record.prefill_s
    if record.finished_s is not None:
        attributes["gen_ai.latency.e2e"] = record.finished_s - record.arrival_s
    if record.first_token_s is not None and record.finished_s is not None:
        decode_s = record.finished_s - record.first_token_s
        attributes["gen_ai.latency.time_in_model_decode"] = decode_s
        attributes["gen_ai.latency.time_in_model_inference"] = record.prefill_s + decode_s
    return {name: value for name, value in attributes.items() if value is not None}


def as_epoch_ns(monotonic_s: float) -> int:
    """What the clock on the wall showed then."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


def _is_installed(package: str) -> bool:
    try:
        return util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False
