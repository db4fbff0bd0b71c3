"""Makes the spans of jobs from events.

A trace has a root span for the job. Below it is a span for each role call, and below that one for each request to an
engine and each tool call. Names and attributes follow OpenTelemetry's conventions for generative AI where they exist.
Prompts, replies and answers are not recorded.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from agents.workflow import Unusable
from runtime.config import Config
from runtime.engines.replicas import engine_of
from runtime.events import (
    CallBegan,
    CallEnded,
    CallFailed,
    EngineChanged,
    Event,
    JobEnded,
    RoleReplied,
    ToolCalled,
    ToolReturned,
)
from runtime.tracing.export import SpanExport

NS = 1_000_000_000
"""Nanoseconds of a second."""
FIRST_TOKEN = "troupe.first_token"
"""The event at which a request's queueing ends and its generating begins."""
_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class EndedJob:
    """The contents of a job's root span. Times are nanoseconds since 1970.

    `state` is the last state of the job, and `error` says why the job has no answer. `moments` holds the events
    of the job while it was queued or ran: the time, the name and the reason, if there is one.
    """

    id: str
    state: str
    error: str | None
    start_ns: int
    end_ns: int
    input_tokens: int
    output_tokens: int
    attempts: int = 1
    confirmed: bool | None = None
    moments: Sequence[tuple[int, str, str]] = ()


@dataclass
class _Call:
    """An open role call: its span, its tokens so far, and the span of its open tool call."""

    span: Span
    input_tokens: int = 0
    output_tokens: int = 0
    tool: Span | None = None


@dataclass
class _Request:
    """An open request to an engine."""

    span: Span
    engine: str
    call: _Call
    began_ns: int


@dataclass
class _Run:
    """A running job: the context of its root span, its open role calls by number, and its open requests by id."""

    root: SpanContext
    calls: dict[int, _Call] = field(default_factory=dict)
    requests: dict[str, _Request] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def parent(self) -> Context:
        return set_span_in_context(NonRecordingSpan(self.root), Context())


class JobSpans:
    """A listener that makes the spans of jobs.

    A `resumable` job is one of the service: it can run several times, in one process after another, and its id has 32
    random hexadecimal digits. Its trace has the same id, so every run adds to one trace, and nothing has to be stored.
    The owner calls `end` once for such a job. Any other job gets a random trace id, and ends with its run.
    """

    def __init__(self, export: SpanExport, config: Config, resumable: bool) -> None:
        self._export = export
        self._resumable = resumable
        self._workflow = config.workflow.name
        self._roles = {seat: _short(member.role) for seat, member in config.team.items()}
        self._engines = {seat: member.engine for seat, member in config.team.items()}
        self._models = {name: _short(spec.model) for name, spec in config.engines.items()}
        self._runs: dict[str, _Run] = {}

    def on_event(self, event: Event) -> None:
        """Start or end the span that an event belongs to."""
        match event:
            case CallBegan():
                self._begin_request(event)
            case CallEnded():
                self._end_request(event)
            case CallFailed() if (run := self._runs.get(event.job)) and (
                asked := run.requests.pop(event.request, None)
            ):
                _fail(asked.span, event.kind, event.error)
            case ToolCalled():
                self._begin_tool(event)
            case ToolReturned() if (call := self._open_call(event.job, event.number)) and call.tool is not None:
                if event.use.failed:
                    _fail(call.tool, "tool_error", "the tool failed")
                else:
                    call.tool.end()
                call.tool = None
            case RoleReplied():
                self._end_call(event)
            case EngineChanged():
                self._note_engine(event)
            case JobEnded():
                self._end_run(event)

    def end(self, job: EndedJob) -> None:
        """Export the root span of a job that has ended."""
        self._export_root(self._place(job.id), job)

    def _run(self, job: str) -> _Run:
        if job not in self._runs:
            self._runs[job] = _Run(self._place(job))
        return self._runs[job]

    def _place(self, job: str) -> SpanContext:
        return self._export.place_root(f"invoke_workflow {self._workflow}", int(job, 16) if self._resumable else None)

    def _open_call(self, job: str, number: int) -> _Call | None:
        run = self._runs.get(job)
        return run.calls.get(number) if run else None

    def _call(self, job: str, number: int, seat: str, retries: int = 0) -> _Call:
        """Return an open role call. Start its span if this is its first request or tool call."""
        run = self._run(job)
        if number not in run.calls:
            attributes: Mapping[str, str | int] = {
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.agent.name": seat,
                "troupe.job.id": job,
                "troupe.role": self._roles.get(seat, ""),
                "troupe.engine": self._engines.get(seat, ""),
                "troupe.call.number": number,
                "troupe.call.retries": retries,
            }
            span = self._export.start(f"invoke_agent {seat}", run.parent, SpanKind.INTERNAL, attributes)
            run.calls[number] = _Call(span)
        return run.calls[number]

    def _begin_request(self, event: CallBegan) -> None:
        call = self._call(event.job, event.number, event.seat, event.retries)
        model, request = self._models.get(event.engine, event.engine), event.request
        attributes: dict[str, str | bool | int | float] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": model,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.request.stream": True,
            "troupe.engine": event.engine,
            "troupe.request.id": request.request_id,
        }
        if request.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = request.max_tokens
        if request.seed is not None:
            attributes["gen_ai.request.seed"] = request.seed
        below = set_span_in_context(call.span, Context())
        span = self._export.start(f"chat {model}", below, SpanKind.CLIENT, attributes)
        _PROPAGATOR.inject(event.trace_headers, set_span_in_context(span, Context()))
        self._run(event.job).requests[request.request_id] = _Request(span, event.engine, call, time.time_ns())

    def _end_request(self, event: CallEnded) -> None:
        run = self._runs.get(event.job)
        asked = run.requests.pop(event.request, None) if run else None
        if run is None or asked is None:
            return
        output_tokens = sum(event.chunk_tokens)
        for counts in (run, asked.call):
            counts.input_tokens += event.prompt_tokens
            counts.output_tokens += output_tokens
        asked.span.set_attributes(_tokens(event.prompt_tokens, output_tokens))
        if event.finish is not None:
            asked.span.set_attribute("gen_ai.response.finish_reasons", [event.finish])
        if event.chunk_times_s:
            waited_s = max(event.chunk_times_s[0] - event.asked_s, 0.0)
            asked.span.set_attribute("gen_ai.response.time_to_first_chunk", waited_s)
            asked.span.add_event(FIRST_TOKEN, timestamp=asked.began_ns + int(waited_s * NS))
        asked.span.end()

    def _begin_tool(self, event: ToolCalled) -> None:
        call = self._call(event.job, event.number, event.seat)
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": event.call.tool,
            "gen_ai.tool.type": "function",
        }
        below = set_span_in_context(call.span, Context())
        call.tool = self._export.start(f"execute_tool {event.call.tool}", below, SpanKind.INTERNAL, attributes)

    def _end_call(self, event: RoleReplied) -> None:
        run = self._runs.get(event.job)
        call = run.calls.pop(event.number, None) if run else None
        if call is None:
            return
        call.span.set_attributes(_tokens(call.input_tokens, call.output_tokens))
        if event.note:
            call.span.set_attribute("troupe.reply.note", event.note)
        if isinstance(event.reply, Unusable):
            _fail(call.span, "unusable_reply", event.reply.why)
        else:
            call.span.end()

    def _note_engine(self, event: EngineChanged) -> None:
        """Add an engine's new state to the requests that it serves, which explains a long wait or a restart."""
        for run in self._runs.values():
            for asked in run.requests.values():
                if asked.engine == engine_of(event.engine):
                    asked.span.add_event("troupe.engine.state", {"troupe.engine.state": str(event.state)})

    def _end_run(self, event: JobEnded) -> None:
        """End the spans that are still open. Export the root, unless the job can run again."""
        if self._resumable and event.job not in self._runs:
            return
        run, error = self._run(event.job), event.error or "the workflow ended without this reply"
        del self._runs[event.job]
        for call in run.calls.values():
            for span in (call.tool, call.span):
                if span is not None:
                    _fail(span, "job_ended", error)
        if not self._resumable:
            state = "done" if event.error is None else "cancelled" if event.error == "cancelled" else "failed"
            end_ns = time.time_ns()
            start_ns = end_ns - int(event.seconds * NS)
            tokens = run.input_tokens, run.output_tokens
            self._export_root(run.root, EndedJob(event.job, state, event.error, start_ns, end_ns, *tokens))

    def _export_root(self, root: SpanContext, job: EndedJob) -> None:
        attributes: dict[str, str | bool | int] = {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.workflow.name": self._workflow,
            "troupe.job.id": job.id,
            "troupe.job.state": job.state,
            "troupe.job.attempts": job.attempts,
            **_tokens(job.input_tokens, job.output_tokens),
        }
        if job.confirmed is not None:
            attributes["troupe.job.confirmed"] = job.confirmed
        span = self._export.start_root(root, f"invoke_workflow {self._workflow}", attributes, job.start_ns)
        for at_ns, name, why in job.moments:
            span.add_event(name, {"troupe.why": why} if why else None, at_ns)
        if job.error is None:
            span.end(job.end_ns)
        else:
            _fail(span, job.state, job.error, job.end_ns)


def _fail(span: Span, kind: str, error: str, end_ns: int | None = None) -> None:
    """End a span with an error. `kind` is one of few words, as OpenTelemetry asks for."""
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, error or kind))
    span.end(end_ns)


def _tokens(input_tokens: int, output_tokens: int) -> Mapping[str, int]:
    return {"gen_ai.usage.input_tokens": input_tokens, "gen_ai.usage.output_tokens": output_tokens}


def _short(name: str) -> str:
    """Return the last part of a path. Return the name of a registered role, or of a model on a hub, as it is."""
    return Path(name).name if name.startswith("/") else name
