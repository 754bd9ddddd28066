"""One span a prompt, under the caller's, to a collector; and the refusal without the packages."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from argosy.sampling_params import SamplingParams
from argosy.server.records import RequestRecord
from argosy.server.settings import ServerConfig
from argosy.server.tracing import _is_installed, build_tracer, check_installed, complete_url, describe

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
has_otel = _is_installed("opentelemetry.sdk.trace") and _is_installed("opentelemetry.exporter.otlp.proto.http")
needs_otel = pytest.mark.skipif(not has_otel, reason="the extra otel is not installed")


class Collector(HTTPServer):
    """Takes what is sent to it."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # noqa: N802, the library's name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def record(**changes: object) -> RequestRecord:
    fields: dict[str, object] = {
        "request_id": "r",
        "params": SamplingParams(max_tokens=7, temperature=0.5, n=2),
        "num_prompt_tokens": 11,
        "num_cached_tokens": 4,
        "num_output_tokens": 9,
        "longest_output": 5,
        "arrival_s": 100.0,
        "queued_s": 0.25,
        "first_token_s": 101.0,
        "finished_s": 103.0,
        "finish_reasons": ("stop", "length"),
        "error": None,
        "trace_parent": None,
    }
    return RequestRecord(**(fields | changes))  # type: ignore[arg-type]


def test_a_span_has_token_counts_and_latencies() -> None:
    attributes = describe(record(), "m")
    assert attributes["gen_ai.request.id"] == "r" and attributes["gen_ai.response.model"] == "m"
    assert attributes["gen_ai.request.max_tokens"] == 7 and attributes["gen_ai.request.n"] == 2
    assert (attributes["gen_ai.usage.prompt_tokens"], attributes["gen_ai.usage.completion_tokens"]) == (11, 9)
    latencies = {name[15:]: value for name, value in attributes.items() if name.startswith("gen_ai.latency.")}
    assert latencies == {
        "time_in_queue": 0.25,
        "time_to_first_token": 1.0,
        "time_in_model_prefill": 0.75,
        "time_in_model_decode": 2.0,
        "time_in_model_inference": 2.75,
        "e2e": 3.0,
    }
    early = describe(record(first_token_s=None, finished_s=None), "m")
    assert not any("latency" in name for name in early)


def test_urls_without_a_path_get_the_usual_one() -> None:
    assert complete_url("http://host:4318") == complete_url("http://host:4318/") == "http://host:4318/v1/traces"
    assert complete_url("https://host/own/path") == "https://host/own/path"
    with pytest.raises(ValueError, match="otlp_traces_endpoint must be a URL.*'host:4317'"):
        ServerConfig(otlp_traces_endpoint="host:4317")


def test_without_the_packages_traces_are_refused() -> None:
    with pytest.raises(ValueError, match=r"otlp_traces_endpoint \('http://host'\).*pip install 'argosy\[otel\]'"):
        check_installed("http://host", ("json", "no_such_package.sdk.trace"))
    if not has_otel:
        with pytest.raises(ValueError, match="opentelemetry"):
            build_tracer("http://host", "m", "1")


@needs_otel
def test_requests_reach_the_collector_under_their_callers_span(build_stand, collector: Collector) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    tracer = build_tracer(collector.url, "argosy-tiny", "1.2.3")
    stand = build_stand()
    stand.service.board._tracer = tracer

    async def go() -> None:
        async with stand.client() as client:
            headers = {"traceparent": PARENT, "x-request-id": "mine"}
            body = {"prompt": "6 * 7?", "max_tokens": 3, "temperature": 0.5}
            await client.post("/v1/completions", json=body, headers=headers)
            await client.post("/v1/completions", json=body, headers={"traceparent": "nonsense"})
            await client.post("/v1/completions", json=body, headers={"traceparent": PARENT[:-1] + "0"})  # not sampled
            stand.pool.is_held = True
            assert (await client.post("/v1/completions", json=body | {"timeout": 0.05})).status_code == 504

    asyncio.run(go())
    tracer.close()
    assert {path for path, _ in collector.bodies} == {"/v1/traces"}
    sent = [ExportTraceServiceRequest.FromString(body) for _, body in collector.bodies]
    resources = [resource for each in sent for resource in each.resource_spans]
    named = {attribute.key: attribute.value.string_value for attribute in resources[0].resource.attributes}
    assert (named["service.name"], named["service.version"]) == ("argosy", "1.2.3")
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert len(spans) == 3 and {span.name for span in spans} == {"llm_request"}
    first, orphan, late = spans
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert orphan.trace_id.hex() != TRACE_ID and not orphan.parent_span_id
    attributes = {attribute.key: attribute.value for attribute in first.attributes}
    assert attributes["gen_ai.request.id"].string_value == "mine"
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 3
    assert attributes["gen_ai.request.temperature"].double_value == 0.5
    e2e_s = attributes["gen_ai.latency.e2e"].double_value
    assert (first.end_time_unix_nano - first.start_time_unix_nano) / 1e9 == pytest.approx(e2e_s, abs=0.01)
    assert late.status.code == 2 and "not finished within 0.05 s" in late.status.message
    assert b"6 * 7" not in b"".join(body for _, body in collector.bodies)


@needs_otel
def test_a_collector_that_is_away_costs_no_request(build_stand) -> None:
    stand = build_stand()
    stand.service.board._tracer = build_tracer("http://127.0.0.1:9", "argosy-tiny", "1")

    async def go() -> None:
        async with stand.client() as client:
            assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200

    asyncio.run(go())
