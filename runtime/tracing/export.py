"""Exports spans over OTLP. Only this module imports OpenTelemetry's SDK.

A thread of the SDK sends finished spans in batches, so no job waits for the receiver. If the thread's queue is full,
the SDK drops spans. If the receiver is away, the log has one line about it.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Span, SpanContext, SpanKind, TraceFlags

from runtime.config import Traces
from runtime.errors import ConfigError

SHUTDOWN_S = 5.0
"""The longest wait at a command's end for the export of the last spans. Spans that are not exported then are lost."""
ABORT_S = 0.5
"""The longest time that an aborted export may take to return."""
HTTP_PATH = "/v1/traces"
QUEUE_LOGGER = "opentelemetry.sdk._shared_internal"
"""The logger of the SDK's queue. It reports each span that a full queue drops."""

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]

_log = logging.getLogger(__name__)


class SpanExport:
    """An async context manager that makes spans and exports them.

    Leaving it exports the spans that have ended, for at most SHUTDOWN_S. Spans that have not ended are not exported.
    `source` names the configuration in errors. Raises ConfigError if the SDK refuses an `OTEL_*` variable.
    """

    def __init__(self, settings: Traces, source: str) -> None:
        self._ids = _RootIds()
        try:
            self._exporter = _ReportingExporter(_otlp_exporter(settings), settings.endpoint)
            self._provider = TracerProvider(resource=_resource(), id_generator=self._ids, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        except Exception as error:  # the SDK raises all kinds of errors for variables that it cannot use
            raise ConfigError(
                f"{source}: traces: OpenTelemetry refuses its settings: {error}; correct the OTEL_* variables in the "
                "environment, or leave out traces"
            ) from error
        self._tracer = self._provider.get_tracer("troupe")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        closing = threading.Thread(target=self._provider.shutdown, name="close traces", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, SHUTDOWN_S)
        if closing.is_alive():
            _log.warning("traces: the last spans could not be exported within %g s and are lost", SHUTDOWN_S)
            self._exporter.abort()
            await asyncio.to_thread(closing.join, ABORT_S)
        if not closing.is_alive():
            self._exporter.unmute()

    def place_root(self, name: str, trace_id: int | None = None) -> SpanContext:
        """Return the context of a root span that `start_root` will start. Other spans can be its children before that.

        `trace_id` is the id of the trace, or None for a random one. The same id always gives the same context, so that
        a later process can add spans to the trace, and its root.
        """
        trace_id = self._ids.generate_trace_id() if trace_id is None else trace_id
        decision = self._provider.sampler.should_sample(None, trace_id, name).decision
        flags = TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT
        span_id = trace_id >> 64 or 1
        return SpanContext(trace_id, span_id, False, TraceFlags(flags | TraceFlags.RANDOM_TRACE_ID))

    def start_root(self, root: SpanContext, name: str, attributes: Attributes, start_ns: int) -> Span:
        """Start the span of a context that `place_root` returned. `start_ns` is in nanoseconds since 1970."""
        with self._ids.fixed(root):
            return self._tracer.start_span(name, Context(), SpanKind.INTERNAL, attributes, start_time=start_ns)

    def start(self, name: str, parent: Context, kind: SpanKind, attributes: Attributes) -> Span:
        """Start a span now, below the span of a context."""
        return self._tracer.start_span(name, parent, kind, attributes)


class _RootIds(RandomIdGenerator):
    """Random ids, except for a root span that other spans already refer to."""

    def __init__(self) -> None:
        self._root: SpanContext | None = None

    @contextmanager
    def fixed(self, root: SpanContext) -> Iterator[None]:
        """Give the span that is started in the block the ids of a context."""
        self._root = root
        try:
            yield
        finally:
            self._root = None

    def generate_trace_id(self) -> int:
        return super().generate_trace_id() if self._root is None else self._root.trace_id

    def generate_span_id(self) -> int:
        return super().generate_span_id() if self._root is None else self._root.span_id


class _ReportingExporter(SpanExporter):
    """An exporter that logs one line if exports begin to fail, and one if they succeed again.

    The SDK's exporters log each failed try of each batch instead. Their lines about this exporter are muted until
    `unmute`. vLLM may export from the same process, and its lines stay.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._lost = 0
        self._aborted = False
        self._exporting: int | None = None  # the id of the thread that exports
        self._reasons: list[str] = []
        modules = {base.__module__ for base in type(exporter).__mro__}
        names = [name for name in modules if name.startswith("opentelemetry.exporter")]
        self._filters: dict[str, Callable[[logging.LogRecord], bool]] = dict.fromkeys(names, self._keep_reason)
        self._filters[QUEUE_LOGGER] = _first_of_each()
        for name, keep in self._filters.items():
            logging.getLogger(name).addFilter(keep)

    def unmute(self) -> None:
        """Let the SDK's loggers log again."""
        for name, keep in self._filters.items():
            logging.getLogger(name).removeFilter(keep)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export a batch. Log the first failure, with its reason, and the first success after it."""
        self._exporting = threading.get_ident()
        self._reasons.clear()
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._lost:
                _log.info("traces: %s takes spans again; %d spans were lost", self._endpoint, self._lost)
            self._lost = 0
        else:
            if not self._lost and not self._aborted:
                _log.warning(
                    "traces: %s takes no spans, and they are lost until it does; see traces.endpoint and "
                    "traces.protocol in the configuration: %s",
                    self._endpoint,
                    "; ".join(dict.fromkeys((*self._reasons[:1], *self._reasons[-1:]))),
                )
            self._lost += len(spans)
        return result

    def shutdown(self) -> None:
        """Refuse further exports."""
        if not self._aborted:
            self._exporter.shutdown()

    def abort(self) -> None:
        """End the export that runs, refuse further ones, and log nothing about them."""
        self._aborted = True
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Do nothing: an exporter keeps no spans."""
        return True

    def _keep_reason(self, record: logging.LogRecord) -> bool:
        if record.thread != self._exporting:
            return True
        self._reasons.append(record.getMessage())
        return False


def _first_of_each() -> Callable[[logging.LogRecord], bool]:
    """Return a filter that lets the first record of each message pass."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.msg in seen
        seen.add(record.msg)
        return not known

    return is_new


def _otlp_exporter(settings: Traces) -> SpanExporter:
    if settings.protocol == "grpc":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core logs to the terminal if a receiver goes away
        return GrpcExporter(endpoint=settings.endpoint)
    has_path = urlsplit(settings.endpoint).path.strip("/")
    return HttpExporter(endpoint=settings.endpoint if has_path else settings.endpoint.rstrip("/") + HTTP_PATH)


def _resource() -> Resource:
    """Return the resource that the environment describes. Its service is `troupe` unless a variable names it."""
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "troupe"}))
    return resource
