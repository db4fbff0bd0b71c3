"""Runs a job's workflow: makes the calls that it asks for, and gives each reply back to it.

Keeps no state between jobs. The orchestrator reports a job's error in its result; other jobs continue.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from agents.role import TaskRefused
from agents.workflow import RoleCall, Workflow
from runtime.engines.handle import EngineHandle
from runtime.errors import BudgetSpent, EngineError, InputError, PluginError, RequestRefused
from runtime.events import JobAdvanced, JobEnded, JobRestarted, Listener, RoleReplied, ignore
from runtime.jobs.caller import Caller, Waiting
from runtime.jobs.job import Job, JobResult
from runtime.jobs.plugin_calls import call_plugin
from runtime.jobs.reply_record import ReplyRecord, StoredReply
from runtime.jobs.run import Run, ToolLog, no_log
from runtime.jobs.team import Seat, Team
from runtime.jobs.tool_record import ToolRecord, tool_entry
from runtime.tools.toolbox import Toolbox

STREAM_INTERVAL = 64
"""Tokens that an engine sends at once.

A job only uses whole replies, and with small models, receiving a token costs as much as generating it. If the engine
dies, the reply resumes from the last tokens received.
"""


class Orchestrator:
    """Runs any number of jobs at once with one team, on the engines that its seats name.

    `price` is the cost of the whole device per hour, of which a call is charged for its share of the memory over time.
    `stream_interval` is the number of tokens that an engine sends at once; benchmarks use 1, to time every token.
    `toolbox` has the tools that seats name, and has been entered.
    """

    def __init__(
        self,
        team: Team,
        engines: Mapping[str, EngineHandle],
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
        """Run a job to its end and return its result. Cancelling this aborts the job's open requests.

        The job resumes from an earlier run: `past` are its replies, and `tools` the calls of tools that belong to calls
        without a reply, by the number of the call. `log` makes the calls of tools of this run durable.
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
        except asyncio.CancelledError:
            self._tell(JobEnded(job.id, None, "cancelled", clock() - started))
            raise
        result = _result(run, workflow, failure, clock() - started)
        self._tell(JobEnded(job.id, result.answer, result.error, result.elapsed_s))
        return result

    def _begin(
        self, run: Run, past: Sequence[StoredReply], tools: Mapping[int, Sequence[ToolRecord]]
    ) -> tuple[Workflow, list[RoleCall], Mapping[int, Sequence[ToolRecord]]]:
        """Replay the past replies in a new workflow. Return it with the calls that are due now, and their past tools.

        Start from the beginning if a reply does not fit, because the configuration names another workflow now, or
        because the workflow is not deterministic. What past calls used counts towards the job's usage even if the job
        starts over.
        """
        for recorded in past:
            run.add(recorded.seat, recorded.used)
        for asked in chain(*(recorded.tools for recorded in past), *tools.values()):
            run.add(asked.seat, asked.used)
        workflow, due = self._start(run)
        for recorded in past:
            call = due.pop(recorded.number, None)
            typed = recorded.to(call) if call is not None else None
            if call is None or typed is None:
                self._tell(JobRestarted(run.job.id))
                workflow, due = self._start(run)
                return workflow, list(due.values()), {}
            due.update((following.number, following) for following in _following(workflow, call, typed))
        return workflow, list(due.values()), tools

    def _start(self, run: Run) -> tuple[Workflow, dict[int, RoleCall]]:
        """Return a new workflow and its first calls by number."""
        workflow = call_plugin("the workflow", self.team.begin, run.job)
        calls = call_plugin("the workflow's begin()", lambda: list(workflow.begin()))
        return workflow, {call.number: call for call in calls}

    async def _work(
        self, run: Run, workflow: Workflow, due: list[RoleCall], tools: Mapping[int, Sequence[ToolRecord]]
    ) -> None:
        """Make the calls that are due and take their replies as they come, until the workflow has an outcome."""
        job = run.job
        self._advanced(job, workflow, "", Counter(call.seat for call in due))
        open_calls: dict[asyncio.Task[ReplyRecord], RoleCall] = {}
        try:
            while workflow.outcome is None:
                if len(due) == 1 and not open_calls:  # the usual case, which needs no task
                    call = due.pop()
                    due = self._take(job, workflow, call, await self._ask(run, workflow, call, tools))
                    continue
                for call in due:
                    asking = self._ask(run, workflow, call, tools)
                    task = asyncio.create_task(asking, name=f"{job.id} {call.seat} {call.number}")
                    open_calls[task] = call
                if not open_calls:
                    raise PluginError("the workflow has no outcome and asks for no call")
                done, _ = await asyncio.wait(open_calls, return_when=asyncio.FIRST_COMPLETED)
                # Sorted by call number, because sets are unordered and the same replies must lead to the same state.
                due = [
                    next_call
                    for task in sorted(done, key=lambda task: open_calls[task].number)
                    for next_call in self._take(job, workflow, open_calls.pop(task), task.result())
                ]
        finally:
            for task in open_calls:
                task.cancel()
            if open_calls:
                await asyncio.wait(open_calls)

    def _take(self, job: Job, workflow: Workflow, call: RoleCall, recorded: ReplyRecord) -> list[RoleCall]:
        """Give a reply to the workflow and tell the listeners. Return the calls that are due now."""
        known_entries = len(workflow.transcript) + len(recorded.tools)
        due = _following(workflow, call, recorded)
        entries = tuple(replace(entry) for entry in workflow.transcript[known_entries:])
        reply = RoleReplied(
            job.id, recorded.number, recorded.seat, recorded.reply, recorded.used, entries, recorded.note
        )
        self._tell(reply)
        self._advanced(job, workflow, call.seat, Counter(call.seat for call in due))
        return due

    def _advanced(
        self, job: Job, workflow: Workflow, replied: str, due: Mapping[str, int], waiting: str | None = None
    ) -> None:
        """Tell the listeners that the job has advanced. `waiting` is a seat whose call comes back after a tool."""
        ahead = call_plugin("the workflow's ahead()", workflow.ahead)
        if waiting is not None and ahead is not None:
            ahead = Counter(ahead) + Counter([waiting])
        self._tell(JobAdvanced(job.id, replied, due, ahead, frozenset(self.team.seats)))

    async def _ask(
        self, run: Run, workflow: Workflow, call: RoleCall, tools: Mapping[int, Sequence[ToolRecord]]
    ) -> ReplyRecord:
        """Make a call and tell the listeners while it waits for a tool, because it then uses no engine."""
        seat: Seat | None = call_plugin("the workflow's call", self.team.seats.get, call.seat)
        if seat is None:
            raise PluginError(
                f"the workflow calls on the seat {call.seat!r}; the team has {', '.join(self.team.seats)}"
            )

        def on_wait(waiting: Waiting) -> None:
            if waiting.waits:
                self._advanced(run.job, workflow, waiting.seat, {}, waiting=waiting.seat)
            else:
                self._advanced(run.job, workflow, "", {waiting.seat: 1})

        return await self.caller.ask(run, seat, call, tools.get(call.number, ()), on_wait)


def _result(run: Run, workflow: Workflow | None, failure: Exception | None, elapsed_s: float) -> JobResult:
    """Return a job's result. `workflow` is None if it could not be made; `failure` is None if the workflow ended."""
    outcome = workflow.outcome if workflow else None
    return JobResult(
        id=run.job.id,
        problem=run.job.problem,
        answer=outcome.answer if outcome else None,
        confirmed=outcome.confirmed if outcome else None,
        rounds=outcome.rounds if outcome else 0,
        steps=workflow.transcript if workflow else [],
        usage=run.usage,
        elapsed_s=elapsed_s,
        expected=run.job.expected,
        error=str(failure) if failure else (outcome.failure if outcome else None),
        transient=isinstance(failure, EngineError) and not isinstance(failure, RequestRefused),
        compare=run.job.compare,
        judged=outcome.correct if outcome else None,
    )


def _following(workflow: Workflow, call: RoleCall, recorded: ReplyRecord) -> list[RoleCall]:
    """Give a reply to the workflow and return the next calls. The transcript gets the reply's tools before it."""
    workflow.transcript += [tool_entry(record.seat, record.use) for record in recorded.tools if record.use is not None]
    known_entries = len(workflow.transcript)
    calls = call_plugin("the workflow's take()", lambda: list(workflow.take(call, recorded.reply)))
    for entry in workflow.transcript[known_entries:][:1]:
        entry.note = recorded.note
    return calls
