"""The spans of jobs over fake engines, as a real receiver gets them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from functools import partial

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from runtime import config
from runtime.config import Config, Traces
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.request import Chunk, GenerateRequest
from runtime.errors import EngineError
from runtime.events import EngineChanged, Event
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import Orchestrator
from runtime.tools.tool import ToolError
from runtime.tracing.traced import Tracing, traced
from tests.runtime.fakes import embedded_team, engines
from tests.runtime.jobs import test_tool_calls as tools
from tests.runtime.tracing.receiver import Receiver, grpc_receiver, values

PROBLEM = "(12+7)*3-(45-5)"
Generate = Callable[[GenerateRequest], AsyncGenerator[Chunk, None]]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with grpc_receiver() as receiver:
        yield receiver


def traced_config(endpoint: str) -> Config:
    return config.load("embedded").model_copy(update={"traces": Traces(endpoint=endpoint)})


async def work(receiver: Receiver, handles: Mapping[str, EngineHandle], problem: str = PROBLEM) -> JobResult:
    """Work a job, and export its spans."""
    async with traced(traced_config(receiver.url)) as tracing:
        return await Orchestrator(embedded_team(), handles, tracing.on_event).run(Job("j", problem))


class Watching:
    """Keeps the requests that an engine gets. It fails the first `failures` of them, and calls `then` in each."""

    def __init__(self, handle: EngineHandle, failures: int = 0) -> None:
        self.requests: list[GenerateRequest] = []
        self.failures = failures
        self.reached = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        handle.generate = partial(self._generate, handle.generate)  # type: ignore[method-assign]

    async def _generate(self, generate: Generate, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.reached.set()
        await self.go.wait()
        if self.failures:
            self.failures -= 1
            raise EngineError("the engine failed")
        async for chunk in generate(request):
            yield chunk


async def test_job_is_one_trace_of_role_calls_and_requests(receiver: Receiver) -> None:
    result = await work(receiver, await engines())
    assert result.answer == "17"
    root = receiver.one("invoke_workflow deliberate")
    assert not root.parent_span_id
    assert {span.trace_id for span in receiver.spans} == {root.trace_id}
    calls = receiver.below(root)
    assert [span.name for span in calls] == [f"invoke_agent {entry.seat}" for entry in result.steps]
    for call in calls:
        [request] = receiver.below(call)
        seat = values(call.attributes)["gen_ai.agent.name"]
        assert request.name == f"chat {seat}"  # the embedded models' folders are named like the seats
        assert call.start_time_unix_nano <= request.start_time_unix_nano
        assert request.end_time_unix_nano <= call.end_time_unix_nano <= root.end_time_unix_nano
    assert len(receiver.spans) == 1 + 2 * len(calls)
    assert receiver.resource["service.name"] == "troupe"


async def test_spans_have_the_attributes_of_the_conventions(receiver: Receiver) -> None:
    result = await work(receiver, await engines(), "12+7")
    root = values(receiver.one("invoke_workflow deliberate").attributes)
    used = result.usage.values()
    assert root == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "deliberate",
        "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in used),
        "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in used),
        "troupe.job.id": "j",
        "troupe.job.state": "done",
        "troupe.job.attempts": 1,
    }
    solver = result.usage["solver"]
    assert values(receiver.one("invoke_agent solver").attributes) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "solver",
        "gen_ai.usage.input_tokens": solver.prompt_tokens,
        "gen_ai.usage.output_tokens": solver.completion_tokens,
        "troupe.job.id": "j",
        "troupe.role": "arithmetic-solver",
        "troupe.engine": "solver",
        "troupe.call.number": 2,
        "troupe.call.retries": 0,
    }
    request = values(receiver.one("chat solver").attributes)
    assert request["gen_ai.request.model"] == "solver"
    assert request["gen_ai.response.finish_reasons"] == ["stop"]
    assert request["gen_ai.usage.output_tokens"] == solver.completion_tokens
    assert request["troupe.request.id"].startswith("j/2/")


async def test_first_token_divides_queueing_from_generating(receiver: Receiver) -> None:
    await work(receiver, await engines(time_scale=1), "12+7")
    request = receiver.one("chat solver")
    [first] = request.events
    assert first.name == "troupe.first_token"
    assert request.start_time_unix_nano < first.time_unix_nano < request.end_time_unix_nano
    waited_s = values(request.attributes)["gen_ai.response.time_to_first_chunk"]
    assert first.time_unix_nano - request.start_time_unix_nano == pytest.approx(waited_s * 1e9, abs=1e7)


async def test_tool_calls_are_spans_below_their_role_call(receiver: Receiver) -> None:
    tool = tools.Counter()
    async with traced(traced_config(receiver.url)) as tracing:
        handles, toolbox = await tools.engine(tools.calls_first(2)), await tools.toolbox(tool)
        orchestrator = Orchestrator(tools.team(), handles, tracing.on_event, toolbox=toolbox)
        result = await orchestrator.run(Job("j", "How many?"))
        assert result.error is None
        tool.error = ToolError("broken")
        await orchestrator.run(Job("k", "How many?"))
    first, second = receiver.named("invoke_agent writer")
    steps = [span.name for span in receiver.below(first)]
    assert steps == ["chat chat", "execute_tool count", "chat chat", "execute_tool count", "chat chat"]
    tokens = [values(s.attributes)["gen_ai.usage.output_tokens"] for s in receiver.below(first) if s.name[:4] == "chat"]
    assert values(first.attributes)["gen_ai.usage.output_tokens"] == sum(tokens)
    called = receiver.below(first)[1]
    assert values(called.attributes)["gen_ai.tool.name"] == "count"
    assert called.status.code == Status.STATUS_CODE_UNSET
    failed = receiver.below(second)[1]
    assert (failed.status.code, values(failed.attributes)["error.type"]) == (Status.STATUS_CODE_ERROR, "tool_error")


async def test_unusable_reply_is_an_error_and_its_retry_says_so(receiver: Receiver) -> None:
    replies = iter(["no number"])
    handles = await engines(lambda text, rng: next(replies, text))
    assert (await work(receiver, handles, "12+7")).answer == "19"
    failed, retried = receiver.named("invoke_agent solver")
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert failed.status.message
    assert values(failed.attributes)["error.type"] == "unusable_reply"
    assert retried.status.code == Status.STATUS_CODE_UNSET
    assert [values(span.attributes)["troupe.call.retries"] for span in (failed, retried)] == [0, 1]


async def test_engine_error_ends_every_open_span_with_it(receiver: Receiver) -> None:
    handles = await engines()
    Watching(handles["solver"], failures=1)
    assert (await work(receiver, handles, "12+7")).error == "the engine failed"
    for name, kind in (
        ("chat solver", "EngineError"),
        ("invoke_agent solver", "job_ended"),
        ("invoke_workflow deliberate", "failed"),
    ):
        span = receiver.one(name)
        assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "the engine failed")
        assert values(span.attributes)["error.type"] == kind


async def test_cancelled_job_ends_its_spans(receiver: Receiver) -> None:
    handles = await engines()
    watching = Watching(handles["solver"])
    watching.go.clear()
    async with traced(traced_config(receiver.url)) as tracing:
        job = asyncio.create_task(Orchestrator(embedded_team(), handles, tracing.on_event).run(Job("j", "12+7")))
        await watching.reached.wait()
        job.cancel()
        await asyncio.wait([job])
    assert values(receiver.one("chat solver").attributes)["error.type"] == "CancelledError"
    root = receiver.one("invoke_workflow deliberate")
    assert (values(root.attributes)["troupe.job.state"], root.status.message) == ("cancelled", "cancelled")


async def test_engine_gets_the_headers_of_its_request_s_span(receiver: Receiver) -> None:
    handles = await engines()
    watching = Watching(handles["solver"])
    await work(receiver, handles, "12+7")
    span = receiver.one("chat solver")
    _, trace_id, span_id, flags = watching.requests[0].trace_headers["traceparent"].split("-")
    assert (trace_id, span_id) == (span.trace_id.hex(), span.span_id.hex())
    assert int(flags, 16) & 1


async def test_sampler_of_the_environment_decides_for_whole_traces(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    handles = await engines()
    watching = Watching(handles["solver"])
    async with traced(traced_config(receiver.url)) as tracing:
        orchestrator = Orchestrator(embedded_team(), handles, tracing.on_event)
        for number in range(30):
            await orchestrator.run(Job(str(number), "12+7"))
    sampled = receiver.named("invoke_workflow deliberate")
    assert 0 < len(sampled) < 30
    assert len(receiver.spans) == len(sampled) * 7  # a job has three role calls, with a request each
    flags = [int(request.trace_headers["traceparent"][-2:], 16) & 1 for request in watching.requests]
    assert sum(flags) == len(sampled)


async def test_engine_that_restarts_is_noted_in_the_requests_that_wait_for_it(receiver: Receiver) -> None:
    handles = await engines()
    watching = Watching(handles["solver"])
    watching.go.clear()
    async with traced(traced_config(receiver.url)) as tracing:
        job = asyncio.create_task(Orchestrator(embedded_team(), handles, tracing.on_event).run(Job("j", "12+7")))
        await watching.reached.wait()
        tracing.on_event(EngineChanged("critic", EngineState.DEAD, 1.0))
        tracing.on_event(EngineChanged("solver", EngineState.DEAD, 1.0))
        watching.go.set()
        await job
    noted = [event for event in receiver.one("chat solver").events if event.name == "troupe.engine.state"]
    assert [values(event.attributes) for event in noted] == [{"troupe.engine.state": "dead"}]


async def test_without_traces_nothing_listens() -> None:
    async with traced(config.load("embedded")) as tracing:
        assert tracing == Tracing()
        events: list[Event] = []
        handles = await engines()
        watching = Watching(handles["solver"])
        await Orchestrator(embedded_team(), handles, events.append).run(Job("j", "12+7"))
    assert watching.requests[0].trace_headers == {}
