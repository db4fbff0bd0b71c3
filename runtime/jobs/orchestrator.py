"""Runs a job's workflow: makes the calls that the workflow returns, and gives the workflow each reply.

The orchestrator keeps no state between jobs. It reports a job's error in the job's result, and other jobs continue.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import index

from agents.role import TaskRefused
from agents.workflow import Entry, RoleCall, Unusable, Workflow
from runtime.engines.request import Engine
from runtime.errors import BudgetSpent, EngineError, InputError, PluginError, RequestRefused
from runtime.events import JobAdvanced, JobEnded, JobRestarted, Listener, RoleReplied, ignore
from runtime.jobs.caller import Caller
from runtime.jobs.job import Job, JobResult
from runtime.jobs.plugin_calls import call_plugin
from runtime.jobs.reply_record import ReplyRecord, StoredReply
from runtime.jobs.run import Run, ToolLog, no_log
from runtime.jobs.team import Team
from runtime.jobs.tool_record import ToolRecord, tool_entry
from runtime.tools.toolbox import Toolbox

STREAM_INTERVAL = 64
"""Tokens that an engine sends at once.

A job uses whole replies only. With small models, receiving a token costs as much processor time as generating it. If
the engine crashes, the reply resumes from the last tokens received.
"""


class Orchestrator:
    """An orchestrator of any number of jobs at once, with one team and the engines that its seats name.

    `price` is the cost of a whole GPU per hour. A call is charged for its share of the memory of each GPU over time.
    `stream_interval` is the number of tokens that an engine sends at once. Benchmarks use 1, to time every token.
    `toolbox` holds the tools that the seats name. The caller enters it before the first job.
    """

    def __init__(
        self,
        team: Team,
        engines: Mapping[str, Engine],
        listener: Listener = ignore,
        price: float | None = None,
        stream_interval: int = STREAM_INTERVAL,
        toolbox: Toolbox | None = None,
    ) -> None:
        self.team = team
        self._tell = listener
        self.caller = Caller(engines, toolbox or Toolbox(), listener, price, stream_interval)

    async def run(
        self,
        job: Job,
        past: Sequence[StoredReply] = (),
        tools: Mapping[int, Sequence[ToolRecord]] | None = None,
        log: ToolLog = no_log,
    ) -> JobResult:
        """Run a job to its end and return its result. A cancellation aborts the job's open requests.

        `past` and `tools` hold the state from which the job resumes: its earlier replies, and the tool calls of each
        call without a reply, by the number of the call. `log` makes the tool calls of this run durable.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        run = Run(job, started, log)
        workflow: Workflow | None = None
        failure: Exception | None = None
        try:
            self.team.check(job.problem, job.compare)
            workflow, due, tools = self._begin(run, past, tools or {})
            await self._work(run, workflow, due, tools)
        except (BudgetSpent, EngineError, InputError, PluginError, TaskRefused) as error:
            failure = error
        except BaseException as error:
            why = "cancelled" if isinstance(error, asyncio.CancelledError) else f"an internal error: {error!r}"
            self._tell(JobEnded(job.id, None, why, clock() - started))
            raise
        result = _result(run, workflow, failure, clock() - started)
        self._tell(JobEnded(job.id, result.answer, result.error, result.elapsed_s))
        return result

    def _begin(
        self, run: Run, past: Sequence[StoredReply], tools: Mapping[int, Sequence[ToolRecord]]
    ) -> tuple[Workflow, list[RoleCall], Mapping[int, Sequence[ToolRecord]]]:
        """Replay the past replies in a new workflow. Return the workflow, the calls due now, and their past tool calls.

        If a reply does not fit, start the job from its beginning. A reply does not fit if the configuration now names
        another workflow, or if the workflow is not deterministic. The usage of past calls counts even if the job starts
        from its beginning.
        """
        for recorded in past:
            run.add(recorded.seat, recorded.used)
        asked = [*chain(*(recorded.tools for recorded in past), *tools.values())]
        for record in asked:
            run.add(record.seat, record.used)
        run.calls = len(past) + 2 * len(asked)  # the calls of seats that asked for the tools, and the tools themselves
        workflow, due = self._start(run)
        for recorded in past:
            call = due.pop(recorded.number, None)
            typed = recorded.to(call) if call is not None else None
            if call is None or typed is None:
                self._tell(JobRestarted(run.job.id))
                run.earlier_uses.clear()
                workflow, due = self._start(run)
                return workflow, list(due.values()), {}
            due.update((following.number, following) for following in _following(run, workflow, call, typed))
        return workflow, list(due.values()), tools

    def _start(self, run: Run) -> tuple[Workflow, dict[int, RoleCall]]:
        """Return a new workflow and its first calls, by number."""
        workflow = call_plugin("the workflow", self.team.begin, run.job)
        calls = call_plugin("the workflow's begin()", lambda: list(workflow.begin()))
        return workflow, {call.number: call for call in calls}

    async def _work(
        self, run: Run, workflow: Workflow, due: list[RoleCall], tools: Mapping[int, Sequence[ToolRecord]]
    ) -> None:
        """Make the calls that are due and give the workflow each reply, until the workflow has an outcome."""
        job = run.job
        self._advanced(job, workflow, "", due)
        open_calls: dict[asyncio.Task[ReplyRecord], RoleCall] = {}
        try:
            while workflow.outcome is None:
                if len(due) == 1 and not open_calls:  # the usual case; it needs no asyncio task
                    call = due.pop()
                    due = self._take(run, workflow, call, await self._ask(run, call, tools))
                    continue
                for call in due:
                    asking = self._ask(run, call, tools)
                    task = asyncio.create_task(asking, name=f"{job.id} {call.seat} {call.number}")
                    open_calls[task] = call
                if not open_calls:
                    raise PluginError("the workflow has no outcome and asks for no call")
                done, _ = await asyncio.wait(open_calls, return_when=asyncio.FIRST_COMPLETED)
                # Sort by call number: `done` is an unordered set, and the same replies must lead to the same state.
                due = [
                    next_call
                    for task in sorted(done, key=lambda task: open_calls[task].number)
                    for next_call in self._take(run, workflow, open_calls.pop(task), task.result())
                ]
        finally:
            for task in open_calls:
                task.cancel()
            if open_calls:
                await asyncio.wait(open_calls)

    def _take(self, run: Run, workflow: Workflow, call: RoleCall, recorded: ReplyRecord) -> list[RoleCall]:
        """Give a reply to the workflow and tell the listeners. Return the calls that are due now."""
        job = run.job
        known_entries = len(workflow.transcript) + len(recorded.tools)
        due = _following(run, workflow, call, recorded)
        entries = tuple(replace(entry) for entry in workflow.transcript[known_entries:])
        reply = RoleReplied(
            job.id, recorded.number, recorded.seat, recorded.reply, recorded.used, entries, recorded.note
        )
        self._tell(reply)
        self._advanced(job, workflow, call.seat, due)
        return due

    def _advanced(self, job: Job, workflow: Workflow, replied: str, due: list[RoleCall]) -> None:
        """Tell the listeners which calls are due and which are certain to follow.

        Raises PluginError for a seat that the team does not have. No listener hears of that seat.
        """
        ahead = call_plugin("the workflow's ahead()", lambda: _counted(workflow.ahead()))
        called = call_plugin("the workflow's call", lambda: Counter(call.seat for call in due))
        seats = frozenset(self.team.seats)
        for seat in (*called, *(ahead or ())):
            if seat not in seats:
                raise PluginError(f"the workflow calls on the seat {seat!r}; the team has {', '.join(self.team.seats)}")
        self._tell(JobAdvanced(job.id, replied, called, ahead, seats))

    async def _ask(self, run: Run, call: RoleCall, tools: Mapping[int, Sequence[ToolRecord]]) -> ReplyRecord:
        """Make one call. `tools` holds the tool calls before the runtime stopped, by the number of the call."""
        return await self.caller.ask(run, self.team.seats[call.seat], call, tools.get(call.number, ()))


def _counted(ahead: Mapping[str, int] | None) -> Mapping[str, int] | None:
    """Return a copy of what a workflow's `ahead` returned, which may be anything. Raise if it is no count of seats."""
    return None if ahead is None else {seat: index(count) for seat, count in ahead.items()}


def _result(run: Run, workflow: Workflow | None, failure: Exception | None, elapsed_s: float) -> JobResult:
    """Return a job's result. `workflow` is None if it did not start. `failure` is None if the workflow ended."""
    outcome = workflow.outcome if workflow else None
    return JobResult(
        id=run.job.id,
        problem=run.job.problem,
        answer=outcome.answer if outcome else None,
        confirmed=outcome.confirmed if outcome else None,
        rounds=outcome.rounds if outcome else 0,
        steps=[*(workflow.transcript if workflow else ()), *_open_tools(run)],
        usage=run.usage,
        elapsed_s=elapsed_s,
        expected=run.job.expected,
        error=str(failure) if failure else (outcome.failure if outcome else None),
        transient=isinstance(failure, EngineError) and not isinstance(failure, RequestRefused),
        compare=run.job.compare,
        judged=outcome.correct if outcome else None,
    )


def _open_tools(run: Run) -> list[Entry]:
    """Return the transcript entries for the tool calls of calls that have no reply because the job failed."""
    records = chain(*(run.tools[number] for number in sorted(run.tools)))
    return [tool_entry(record.seat, record.use) for record in records if record.use is not None]


def _following(run: Run, workflow: Workflow, call: RoleCall, recorded: ReplyRecord) -> list[RoleCall]:
    """Give a reply to the workflow and return the next calls. Add the reply's tool calls to the transcript first."""
    run.end_call(call, recorded.tools, readable=not isinstance(recorded.reply, Unusable))
    workflow.transcript += [tool_entry(record.seat, record.use) for record in recorded.tools if record.use is not None]
    known_entries = len(workflow.transcript)
    calls = call_plugin("the workflow's take()", lambda: list(workflow.take(call, recorded.reply)))
    for entry in workflow.transcript[known_entries:][:1]:
        entry.note = recorded.note
    return calls
