"""Runs a job's workflow on the engines: each role call becomes a request, and each reply goes back to the workflow.

Keeps no state between jobs. The orchestrator reports a job's error in its result; other jobs continue.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import ParamSpec, TypeVar

from agents.role import Message, ReplyUnusable, Role, Task, TaskRefused
from agents.workflow import RoleCall, Unusable, Workflow
from runtime.engines.handle import EngineHandle
from runtime.engines.request import GenerateRequest
from runtime.engines.usage import Charge, Usage
from runtime.errors import BudgetSpent, EngineError, InputError, PluginError, RequestRefused
from runtime.events import CallEnded, JobAdvanced, JobEnded, JobRestarted, Listener, RoleReplied, ignore
from runtime.jobs.job import Job, JobResult
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.team import Seat, Team

STREAM_INTERVAL = 64
"""Tokens that an engine sends at once.

A job only uses whole replies, and with small models, receiving a token costs as much as generating it. If the engine
dies, the reply resumes from the last tokens received.
"""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Run:
    """A job that runs: its start on the event loop's clock, and what each seat has used so far."""

    job: Job
    since_s: float
    usage: dict[str, Usage] = field(default_factory=dict)

    def check_budget(self) -> None:
        """Raise BudgetSpent if the job has used up its `max_tokens`."""
        used = sum(usage.prompt_tokens + usage.completion_tokens for usage in self.usage.values())
        if self.job.max_tokens is not None and used >= self.job.max_tokens:
            raise BudgetSpent(f"the job has used {used} tokens; its max_tokens is {self.job.max_tokens}")

    def add(self, seat: str, used: Usage) -> None:
        """Add what a seat used for a call."""
        self.usage.setdefault(seat, Usage()).add(used)


class Orchestrator:
    """Runs any number of jobs at once with one team, on the engines that its seats name.

    `price` is the cost of the whole device per hour, of which a call is charged for its share of the memory over time.
    `stream_interval` is the number of tokens that an engine sends at once; benchmarks use 1, to time every token.
    """

    def __init__(
        self,
        team: Team,
        engines: Mapping[str, EngineHandle],
        listener: Listener = ignore,
        price: float | None = None,
        stream_interval: int = STREAM_INTERVAL,
    ) -> None:
        self.team = team
        self._engines = engines
        self._price = price
        self._stream_interval = stream_interval
        self._tell = listener
        self._requests = count()

    async def run(self, job: Job, past: Sequence[ReplyRecord] = ()) -> JobResult:
        """Run a job to its end and return its result. `past` are replies from an earlier run, from which it resumes.

        Cancelling this aborts the job's open requests.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        run = Run(job, started)
        workflow: Workflow | None = None
        failure: Exception | None = None
        try:
            self.team.check(job.problem)
            workflow, due = self._begin(run, past)
            await self._work(run, workflow, due)
        except (BudgetSpent, EngineError, InputError, PluginError, TaskRefused) as error:
            failure = error
        except asyncio.CancelledError:
            self._tell(JobEnded(job.id, None, "cancelled", clock() - started))
            raise
        result = _result(run, workflow, failure, clock() - started)
        self._tell(JobEnded(job.id, result.answer, result.error, result.elapsed_s))
        return result

    def _begin(self, run: Run, past: Sequence[ReplyRecord]) -> tuple[Workflow, list[RoleCall]]:
        """Replay the past replies in a new workflow; return it with the calls that are due now.

        Start from the beginning if a reply does not fit, because the configuration names another workflow now, or
        because the workflow is not deterministic. The tokens of past replies count towards
        the job's usage even if the job starts over.
        """
        for recorded in past:
            run.add(recorded.seat, recorded.used)
        workflow = _call_plugin("the workflow", self.team.begin, run.job.problem)
        due = {call.number: call for call in _call_plugin("the workflow's begin()", lambda: list(workflow.begin()))}
        for recorded in past:
            call = due.pop(recorded.number, None)
            if call is None or call.seat != recorded.seat:
                self._tell(JobRestarted(run.job.id))
                return self._begin(run, ())
            due.update((following.number, following) for following in _following(workflow, call, recorded))
        return workflow, list(due.values())

    async def _work(self, run: Run, workflow: Workflow, due: list[RoleCall]) -> None:
        """Make the calls that are due and take their replies as they come, until the workflow has an outcome."""
        job = run.job
        self._advanced(job, workflow, "", due)
        open_calls: dict[asyncio.Task[ReplyRecord], RoleCall] = {}
        try:
            while workflow.outcome is None:
                if len(due) == 1 and not open_calls:  # the usual case, which needs no task
                    call = due.pop()
                    due = self._take(job, workflow, call, await self._ask(run, call))
                    continue
                for call in due:
                    task = asyncio.create_task(self._ask(run, call), name=f"{job.id} {call.seat} {call.number}")
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
        known_entries = len(workflow.transcript)
        due = _following(workflow, call, recorded)
        entries = tuple(replace(entry) for entry in workflow.transcript[known_entries:])
        self._tell(RoleReplied(job.id, recorded.number, recorded.seat, recorded.reply, recorded.used, entries))
        self._advanced(job, workflow, call.seat, due)
        return due

    def _advanced(self, job: Job, workflow: Workflow, replied: str, due: list[RoleCall]) -> None:
        ahead = _call_plugin("the workflow's ahead()", workflow.ahead)
        self._tell(JobAdvanced(job.id, replied, Counter(call.seat for call in due), ahead, frozenset(self.team.seats)))

    async def _ask(self, run: Run, call: RoleCall) -> ReplyRecord:
        """Make one call: send the role's messages to its engine, and let the role parse the text."""
        run.check_budget()
        seat = _call_plugin("the workflow's call", self.team.seats.get, call.seat)
        if seat is None:
            raise PluginError(
                f"the workflow calls on the seat {call.seat!r}; the team has {', '.join(self.team.seats)}"
            )
        request = self._request(run, seat, call)
        used = Usage()
        try:
            text, finish = await self._generate(run.job, seat, request, used)
        finally:
            run.add(seat.name, used)
        try:
            reply = _call_plugin(f"the role at {seat.name}: parse()", lambda: seat.role.parse(text, call.task))
        except ReplyUnusable as error:
            cut_off = f" (cut off at {seat.sampling.max_tokens} tokens)" if finish == "length" else ""
            return ReplyRecord(call.number, seat.name, Unusable(f"{error}{cut_off}"), used)
        return ReplyRecord(call.number, seat.name, reply, used)

    async def _generate(self, job: Job, seat: Seat, request: GenerateRequest, usage: Usage) -> tuple[str, str | None]:
        """Return the whole text of a reply and its finish reason. Add what it used to `usage`, even if it fails."""
        clock = asyncio.get_running_loop().time
        engine = self._engines[seat.engine]
        asked_s, charged_before = clock(), engine.usage.charged()
        pieces: list[str] = []
        times_s: list[float] = []
        tokens: list[int] = []
        prompt_tokens = 0
        finish: str | None = None
        try:
            async with aclosing(engine.generate(request)) as chunks:
                async for chunk in chunks:
                    prompt_tokens = chunk.prompt_tokens
                    pieces.append(chunk.text)
                    times_s.append(chunk.time_s)
                    tokens.append(len(chunk.token_ids))
                    finish = chunk.finish
        finally:
            charge = engine.usage.charged() - charged_before
            cost = self._cost(charge, engine)
            seconds = clock() - asked_s
            charged = charge.byte_seconds, charge.engine_seconds, cost, charge.waking_byte_seconds
            usage.add(Usage(prompt_tokens, sum(tokens), seconds, *charged))
        self._tell(CallEnded(job.id, seat.name, seat.engine, asked_s, tuple(times_s), tuple(tokens), prompt_tokens))
        return "".join(pieces), finish

    def _cost(self, charge: Charge, engine: EngineHandle) -> float | None:
        """Return the price of the memory that a call was charged for, or None if the device has no price."""
        if self._price is None:
            return None
        return self._price / 3600 * charge.byte_seconds / engine.limits.device_bytes

    def _request(self, run: Run, seat: Seat, call: RoleCall) -> GenerateRequest:
        job, sampling = run.job, seat.sampling
        temperature = sampling.temperature if job.temperature is None else job.temperature
        if call.variation:
            temperature = max(temperature, sampling.retry_temperature)
        return GenerateRequest(
            request_id=f"{job.id}/{call.number}/{next(self._requests)}",
            messages=_call_plugin(f"the role at {seat.name}: messages()", lambda: _messages(seat.role, call.task)),
            temperature=temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop,
            seed=None if job.seed is None or not temperature else _seed(job.seed, call),
            schema=_call_plugin(f"the role at {seat.name}: schema()", lambda: seat.role.schema(call.task)),
            priority=job.priority,
            since_s=run.since_s,
            stream_interval=self._stream_interval,
        )


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
    )


def _call_plugin(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a role or a workflow. Raise its errors as PluginError, because a third party may have written it."""
    try:
        return function(*args, **kwargs)
    except (TaskRefused, ReplyUnusable):
        raise
    except Exception as error:
        raise PluginError(f"{what} raised {error!r}") from error


def _following(workflow: Workflow, call: RoleCall, recorded: ReplyRecord) -> list[RoleCall]:
    return _call_plugin("the workflow's take()", lambda: list(workflow.take(call, recorded.reply)))


def _messages(role: Role, task: Task) -> tuple[Message, ...]:
    messages = tuple(role.messages(task))
    if not messages or not all(isinstance(message, Message) for message in messages):
        raise TypeError(f"{messages!r} is not a list of Message, or is empty")
    return messages


def _seed(seed: int, call: RoleCall) -> int:
    """Derive a call's seed from its content, so that jobs that run at the same time do not change its reply."""
    text = f"{seed}/{call.seat}/{call.task!r}/{call.variation}/{call.retries}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
