"""Jobs whose models call tools: the loop, its bounds, and what a crash leaves behind."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.role import Role, Sampling
from agents.roles.summarizer import Summarizer
from agents.tool import ToolSpec
from agents.tool_protocol import ToolCall, ToolUse
from agents.workflows.pipeline import Pipeline
from runtime.engines.fake import FakeEngine
from runtime.engines.handle import EngineHandle
from runtime.engines.request import GenerateRequest
from runtime.engines.usage import Usage
from runtime.events import CallPaused, Event, JobAdvanced, RoleReplied, ToolCalled, ToolReturned
from runtime.jobs import run as run_bounds
from runtime.jobs.caller import INTERRUPTED
from runtime.jobs.job import Job, JobState
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.service import JobService
from runtime.jobs.submission import Submission
from runtime.jobs.team import Seat, Team
from runtime.jobs.tool_record import ToolRecord
from runtime.tools.tool import Tool, ToolError
from runtime.tools.toolbox import Toolbox
from tests.runtime.jobs.test_service import fail_the_first_reply, wait_until

Script = Callable[[GenerateRequest], str]


class Counter(Tool):
    """A tool that counts its calls. The call number `hangs_at` never returns, and all fail if there is an `error`."""

    def __init__(self, name: str = "count", idempotent: bool = False, hangs_at: int = 0) -> None:
        parameters = {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"]}
        self.spec = ToolSpec(name, "Count.", parameters, idempotent)
        self.calls: list[Mapping[str, Any]] = []
        self.hangs_at = hangs_at
        self.error: Exception | None = None

    async def call(self, arguments: Mapping[str, Any]) -> str:
        self.calls.append(arguments)
        if len(self.calls) == self.hangs_at:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return f"count is {len(self.calls)}"


@asynccontextmanager
async def source(tool: Tool):  # type: ignore[no-untyped-def]  # a ToolSource
    yield [tool]


async def toolbox(*tools: Tool) -> Toolbox:
    return await Toolbox({tool.spec.name: source(tool) for tool in tools}).__aenter__()


REFERRING = {"$ref": "http://127.0.0.1:9/schema"}
OLD = {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"by": {"items": [{"type": "integer"}]}}}


@pytest.mark.parametrize(
    ("schema", "arguments", "said"),
    [
        (REFERRING, {"by": 1}, "its arguments cannot be checked: the schema refers to http://127.0.0.1:9/schema"),
        (OLD, {"by": ["one"]}, "arguments.by[0]: 'one' is not of type 'integer'"),
    ],
)
async def test_arguments_are_checked_by_the_schema_that_the_tool_has(
    schema: dict[str, Any], arguments: dict[str, Any], said: str
) -> None:
    tool = Counter()
    tool.spec = replace(tool.spec, parameters=schema)
    use = await (await toolbox(tool)).use(ToolCall("count", arguments, ""))
    assert use.failed
    assert use.output.startswith(said)
    assert not tool.calls


def call(tool: str = "count", **arguments: Any) -> str:
    return json.dumps({"tool": tool, "arguments": arguments})


def outputs(request: GenerateRequest) -> list[str]:
    """Return the outputs of tools that the model has been given."""
    return [
        m.content for m in request.messages if m.role == "user" and m.content.startswith(("Output", "count failed"))
    ]


def calls_first(times: int) -> Script:
    """Return the script of a model that calls the tool a number of times, then replies with the last output."""

    def reply(request: GenerateRequest) -> str:
        given = outputs(request)
        return call(by=len(given)) if len(given) < times else json.dumps({"reply": given[-1].partition("\n")[2]})

    return reply


def team(role: Role | None = None, tool_calls_max: int = 8, seats: Sequence[str] = ("writer",)) -> Team:
    made = {
        name: Seat(name, role or Summarizer(), "chat", Sampling(), tools=("count",), tool_calls_max=tool_calls_max)
        for name in seats
    }
    return Team(made, Pipeline, Pipeline.Options(seats=tuple(seats)))


async def engine(script: Script) -> dict[str, EngineHandle]:
    handle = FakeEngine("chat", script, time_scale=0)
    await handle.start()
    return {"chat": handle}


async def test_model_gets_the_output_of_its_tool_and_the_transcript_shows_it() -> None:
    tool, events = Counter(), list[Event]()
    orchestrator = Orchestrator(team(), await engine(calls_first(2)), events.append, toolbox=await toolbox(tool))
    result = await orchestrator.run(Job("j", "How many?"))
    assert (result.answer, result.error) == ("count is 2", None)
    assert tool.calls == [{"by": 0}, {"by": 1}]
    assert [(entry.seat, entry.input, entry.output) for entry in result.steps] == [
        ("writer", 'count {"by": 0}', "count is 1"),
        ("writer", 'count {"by": 1}', "count is 2"),
        ("writer", "How many?", "count is 2"),
    ]
    [replied] = [event for event in events if isinstance(event, RoleReplied)]
    assert replied.entries == (result.steps[2],)
    assert [type(event) for event in events if isinstance(event, ToolCalled | ToolReturned)] == [
        ToolCalled,
        ToolReturned,
    ] * 2
    assert result.usage["writer"].completion_tokens > replied.usage.completion_tokens


async def test_listeners_are_told_that_a_call_waits_for_its_tool() -> None:
    events: list[Event] = []
    orchestrator = Orchestrator(
        team(seats=("writer", "editor")), await engine(calls_first(1)), events.append, toolbox=await toolbox(Counter())
    )
    await orchestrator.run(Job("j", "How many?"))
    kinds = (JobAdvanced, CallPaused, ToolCalled, ToolReturned)
    told = [event for event in events if isinstance(event, kinds)]
    assert [type(event) for event in told[:5]] == [JobAdvanced, ToolCalled, CallPaused, ToolReturned, CallPaused]
    assert [event for event in told if isinstance(event, CallPaused)][:2] == [
        CallPaused("j", "writer", True),
        CallPaused("j", "writer", False),
    ]
    advanced = [(e.replied, dict(e.due), dict(e.ahead or {})) for e in told if isinstance(e, JobAdvanced)]
    assert advanced == [
        ("", {"writer": 1}, {"editor": 1}),
        ("writer", {"editor": 1}, {}),
        ("editor", {}, {}),
    ]


async def test_model_must_reply_once_its_calls_are_used() -> None:
    schemas: list[Any] = []

    def reply(request: GenerateRequest) -> str:
        schemas.append(request.schema)
        return call(by=1) if len(schemas[-1]["anyOf"]) > 1 else '{"reply": "enough"}'

    tool = Counter()
    orchestrator = Orchestrator(team(tool_calls_max=3), await engine(reply), toolbox=await toolbox(tool))
    result = await orchestrator.run(Job("j", "How many?"))
    assert (result.answer, len(tool.calls)) == ("enough", 3)
    assert [len(schema["anyOf"]) for schema in schemas] == [2, 2, 2, 1]


async def test_call_beyond_the_last_is_not_made() -> None:
    tool = Counter()
    orchestrator = Orchestrator(team(tool_calls_max=2), await engine(lambda _: call(by=1)), toolbox=await toolbox(tool))
    result = await orchestrator.run(Job("j", "How many?"))
    assert "the model has made all its 2 tool calls" in str(result.error)
    assert len(tool.calls) == 2


async def test_call_that_is_cut_off_is_not_made() -> None:
    tool = Counter()
    cut = '{"tool": "count", "arguments": {"by": 1, "more": "and so on and on"'
    made = team()
    seats = {name: replace(seat, max_tokens=7) for name, seat in made.seats.items()}
    orchestrator = Orchestrator(replace(made, seats=seats), await engine(lambda _: cut), toolbox=await toolbox(tool))
    result = await orchestrator.run(Job("j", "How many?"))
    assert tool.calls == []
    assert str(result.error).endswith("the tool call or the reply is incomplete (cut off at 7 tokens)")


async def test_next_try_after_an_unreadable_reply_does_not_repeat_the_tools() -> None:
    tool, asked = Counter(), list[int]()

    def reply(request: GenerateRequest) -> str:
        asked.append(len(outputs(request)))
        if not outputs(request):
            return call(by=1)
        return "dots" if len(asked) == 2 else '{"reply": "done"}'

    result = await Orchestrator(team(), await engine(reply), toolbox=await toolbox(tool)).run(Job("j", "How many?"))
    assert (result.answer, len(tool.calls), asked) == ("done", 1, [0, 1, 1])
    assert result.steps[0].output == "count is 1"
    assert len(result.steps) == 3


async def test_tools_of_a_call_that_fails_are_in_the_transcript() -> None:
    orchestrator = Orchestrator(team(), await engine(lambda _: call(by=1)), toolbox=await toolbox(Counter()))
    result = await orchestrator.run(Job("j", "How many?", max_tokens=100))
    assert "its max_tokens is 100" in str(result.error)
    assert result.steps
    assert all(entry.output.startswith("count is") for entry in result.steps)


async def test_calls_of_another_task_s_tools_are_not_taken_over() -> None:
    stale = ToolRecord(1, "writer", "of another task", ToolCall("count", {"by": 9}, ""), Usage(), None)
    tool = Counter()
    orchestrator = Orchestrator(team(), await engine(calls_first(1)), toolbox=await toolbox(tool))
    result = await orchestrator.run(Job("j", "How many?"), tools={1: [stale]})
    assert (result.answer, tool.calls) == ("count is 1", [{"by": 0}])


@pytest.mark.parametrize(
    ("text", "output"),
    [
        (call(by="x"), "arguments.by: 'x' is not of type 'integer'"),
        (call(), "arguments: 'by' is a required property"),
        (call(tool="shell", by=1), "no tool is named 'shell'; known: count"),
    ],
)
async def test_wrong_call_is_explained_to_the_model(text: str, output: str) -> None:
    told: list[str] = []

    def reply(request: GenerateRequest) -> str:
        told.append(request.messages[-1].content)
        return text if len(told) == 1 else '{"reply": "sorry"}'

    tool = Counter()
    result = await Orchestrator(team(), await engine(reply), toolbox=await toolbox(tool)).run(Job("j", "How many?"))
    assert (result.answer, tool.calls) == ("sorry", [])
    assert output in told[1]
    assert result.steps[0].verdict == "failed"


@pytest.mark.parametrize("error", [ToolError("no disk"), RuntimeError("a defect")])
async def test_tool_that_fails_costs_its_call_only(error: Exception) -> None:
    tool = Counter()
    tool.error = error
    orchestrator = Orchestrator(team(), await engine(calls_first(1)), toolbox=await toolbox(tool))
    result = await orchestrator.run(Job("j", "How many?"))
    assert result.error is None
    assert str(error) in str(result.answer)


async def test_text_that_is_neither_a_call_nor_a_reply_is_asked_for_again() -> None:
    replies = iter(["dots", '{"reply": "done"}'])
    orchestrator = Orchestrator(team(), await engine(lambda _: next(replies)), toolbox=await toolbox(Counter()))
    result = await orchestrator.run(Job("j", "How many?"))
    assert (result.answer, result.steps[0].verdict) == ("done", "rejected")


async def test_job_cannot_call_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_bounds, "CALLS_MAX", 20)
    tool = Counter()
    endless = Orchestrator(team(tool_calls_max=1000), await engine(lambda _: call(by=1)), toolbox=await toolbox(tool))
    result = await endless.run(Job("j", "How many?"))
    assert result.error == "the job has made 20 calls of seats and tools, which is the most it may make"
    assert len(tool.calls) == 10


async def test_tools_use_the_tokens_of_the_job() -> None:
    orchestrator = Orchestrator(team(), await engine(calls_first(5)), toolbox=await toolbox(Counter()))
    result = await orchestrator.run(Job("j", "How many?", max_tokens=1))
    assert "its max_tokens is 1" in str(result.error)


async def restarted(path: Path, script: Script, tool: Counter, seats: Sequence[str] = ("writer",)) -> dict[str, Any]:
    """Work the journal's only job to its end with a new service, and return its result."""
    async with JobService(path, made := team(seats=seats)) as jobs:
        jobs.use(Orchestrator(made, await engine(script), jobs.on_event, toolbox=await toolbox(tool)))
        [record] = await jobs.journal.read(all_jobs)
        await wait_until(lambda: not any(jobs.counts.values()))
        ended = await jobs.get(record)
        assert ended is not None
        assert ended.state is JobState.DONE
        assert ended.result is not None
        return ended.result


def all_jobs(connection: Any) -> list[str]:
    return [id for (id,) in connection.execute("SELECT id FROM jobs")]


@pytest.mark.parametrize(
    ("idempotent", "calls", "answer"), [(True, 1, "count is 1"), (False, 0, INTERRUPTED)], ids=["repeatable", "not"]
)
async def test_interrupted_call_is_repeated_only_if_it_may_be(
    tmp_path: Path, idempotent: bool, calls: int, answer: str
) -> None:
    path, tool = tmp_path / "jobs.db", Counter(idempotent=idempotent, hangs_at=1)
    async with JobService(path, team()) as jobs:
        jobs.use(Orchestrator(team(), await engine(calls_first(1)), jobs.on_event, toolbox=await toolbox(tool)))
        await jobs.submit(Submission(problem="How many?"))
        await wait_until(lambda: len(tool.calls) == 1)
    again = Counter(idempotent=idempotent)
    result = await restarted(path, calls_first(1), again)
    assert (result["answer"], len(again.calls)) == (answer, calls)
    assert [entry["output"] for entry in result["steps"]] == [answer, answer]


async def test_finished_call_is_not_repeated(tmp_path: Path) -> None:
    path, tool = tmp_path / "jobs.db", Counter(hangs_at=2)
    async with JobService(path, team()) as jobs:
        jobs.use(Orchestrator(team(), await engine(calls_first(2)), jobs.on_event, toolbox=await toolbox(tool)))
        await jobs.submit(Submission(problem="How many?"))
        await wait_until(lambda: len(tool.calls) == 2)
    again = Counter(idempotent=True)
    result = await restarted(path, calls_first(2), again)
    whole = await Orchestrator(team(), await engine(calls_first(2)), toolbox=await toolbox(Counter())).run(
        Job("j", "How many?")
    )
    assert again.calls == [{"by": 1}]
    assert [entry["output"] for entry in result["steps"]] == ["count is 1", "count is 1", "count is 1"]
    for key in ("completion_tokens", "prompt_tokens"):
        assert result["usage"]["writer"][key] == getattr(whole.usage["writer"], key)


async def test_tool_is_not_repeated_after_a_journal_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service ends while the first reply cannot be written. The next seat's tool has not run before that reply."""
    path, tool, seats = tmp_path / "jobs.db", Counter(hangs_at=3), ("writer", "editor", "printer")
    with monkeypatch.context() as fault:
        failed = fail_the_first_reply(fault)
        async with JobService(path, made := team(seats=seats)) as jobs:
            jobs.use(Orchestrator(made, await engine(calls_first(1)), jobs.on_event, toolbox=await toolbox(tool)))
            await jobs.submit(Submission(problem="How many?"))
            await wait_until(lambda: len(failed) > 3 or len(tool.calls) == 3)
    again = Counter()
    await restarted(path, calls_first(1), again, seats=seats)
    assert len(tool.calls) + len(again.calls) == len(seats)


async def test_toolbox_repeats_what_its_tools_allow() -> None:
    box = await toolbox(Counter(), Counter("safe", idempotent=True))
    assert [box.may_repeat(name) for name in ("count", "safe", "gone")] == [False, True, False]
    assert [spec.name for spec in box.specs(("safe", "count"))] == ["safe", "count"]
    use = await box.use(ToolCall("safe", {"by": 1}, ""))
    assert use == ToolUse(use.call, "count is 1")
