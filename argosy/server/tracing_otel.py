"""Spans by way of the OpenTelemetry SDK; imported by ``tracing.py``, and only if traces are asked for.

Invariant: nothing of OpenTelemetry's process-wide state is touched, so that other users of it are left alone.
"""

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from argosy.server.records import RequestRecord
from argosy.server.tracing import SPAN_NAME, as_epoch_ns, describe


class SpanWriter:
    """``Tracer`` to a collector. A span's parent is the caller's ``traceparent``, if that can be read."""

    def __init__(self, exporter: SpanExporter, model: str, version: str) -> None:
        resource = Resource.create({"service.name": "argosy", "service.version": version})
        self._model = model
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("argosy.server", version)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, url: str, model: str, version: str) -> "SpanWriter":
        return cls(OTLPSpanExporter(endpoint=url), model, version)

    def record(self, record: RequestRecord) -> None:
        parent = self._propagator.extract({"traceparent": record.trace_parent} if record.trace_parent else {})
        span = self._tracer.start_span(
            SPAN_NAME,
            context=parent,
            kind=SpanKind.SERVER,
            attributes=describe(record, self._model),
            start_time=as_epoch_ns(record.arrival_s),
        )
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(as_epoch_ns(time.monotonic() if record.finished_s is None else record.finished_s))

    def close(self) -> None:
        """Waits for what is under way, at most for the exporter's own limit."""
        self._provider.shutdown()
