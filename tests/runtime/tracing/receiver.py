"""OTLP receivers in this process, over gRPC and over HTTP, which parse what they are sent."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest as Request,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceResponse as Response,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Receiver:
    """What a receiver has been sent. While `answers` is cleared, exports hang."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.answers.set()

    def take(self, request: Request) -> None:
        """Keep the spans of an export. Wait first until the receiver answers."""
        self.answers.wait()
        for resource_spans in request.resource_spans:
            self.resource = values(resource_spans.resource.attributes)
            for scope_spans in resource_spans.scope_spans:
                self.spans += scope_spans.spans

    def named(self, name: str) -> list[Span]:
        """Return the spans with a name, in order of their start."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_time_unix_nano)

    def one(self, name: str) -> Span:
        """Return the only span with a name."""
        [span] = self.named(name)
        return span

    def below(self, parent: Span) -> list[Span]:
        """Return the children of a span, in order of their start."""
        children = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(children, key=lambda span: span.start_time_unix_nano)


def values(attributes: Any) -> dict[str, Any]:
    """Return attributes as a dictionary."""
    return {item.key: _value(item.value) for item in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def grpc_receiver(port: int = 0) -> Iterator[Receiver]:
    """Receive over gRPC on localhost. 0 takes a free port."""
    receiver = Receiver()

    class Servicer(TraceServiceServicer):
        def Export(self, request: Request, context: object) -> Response:  # noqa: N802
            receiver.take(request)
            return Response()

    server = grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(Servicer(), server)  # type: ignore[no-untyped-call]  # generated
    receiver.url = f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.answers.set()
        server.stop(None).wait()


@contextmanager
def http_receiver() -> Iterator[Receiver]:
    """Receive over HTTP on localhost, at any path."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.paths.append(self.path)
            request = Request()
            request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            receiver.take(request)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Log nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.answers.set()
        server.shutdown()
        server.server_close()
        thread.join()
