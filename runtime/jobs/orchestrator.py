"""Runs workflows over engines: each call of a workflow becomes a request, each reply goes back to it.

Owns nothing that outlives a job. A job never raises for what is wrong with it alone: its result says so, and other
jobs go on.
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
from runtime.engines.usage import Usage
from runtime.errors import BudgetSpent, EngineError, InputError, PluginError, RequestRefused
from runtime.events import CallEnded, JobAdvanced, JobBegunAnew, JobEnded, Listener, RoleReplied, ignore
from runtime.jobs.job import Job, JobResult
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.team import Seat, Team

STREAM_INTERVAL = 64
"""Tokens of a reply that come together: nobody reads them one by one, and taking each from the engine costs as much as
writing it, where models are small. A reply whose engine died goes on from the last that came."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Run:
    """A job at work: when it began (the loop's clock), and what its seats have used so far."""

    job: Job
    since_s: float
    usage: dict[str, Usage] = field(default_factory=dict)

    def check_budget(self) -> None:
        """Raise BudgetSpent when the job's calls have used up its tokens."""
        used = sum(one.prompt_tokens + one.completion_tokens for one in self.usage.values())
        if self.job.max_tokens is not None and used >= self.job.max_tokens:
            raise BudgetSpent(f"the job has used {used} tokens; its max_tokens is {self.job.max_tokens}")

    def add(self, seat: str, used: Usage) -> None:
        """Count what a call of a seat took."""
        self.usage.setdefault(seat, Usage()).add(used)


class Orchestrator:
    """Works jobs with one team over the engines that its seats name; any number of jobs at once.

    `price` is what the whole device costs for an hour: a call costs its part of the device's memory for its time.
    `stream_interval` is how many tokens of a reply come together; 1 streams every token, for who measures them.
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
        """Work one job to its end, going on after the replies that it got before. Cancelling it aborts its open
        requests."""
        clock = asyncio.get_running_loop().time
        started = clock()
        run = Run(job, started)
        workflow: Workflow | None = None
        failure: Exception | None = None
        try:
            self.team.check(job.problem)
            workflow, due = self._begin(run, past)
            await self._work(run, workflow, due)
        except (BudgetSpent, EngineError, InputError, PluginError, TaskRefused) as refusal:
            failure = refusal
        except asyncio.CancelledError:
            self._tell(JobEnded(job.id, None, "cancelled", clock() - started))
            raise
        outcome = workflow.outcome if workflow else None
        result = JobResult(
            id=job.id,
            problem=job.problem,
            answer=outcome.answer if outcome else None,
            confirmed=outcome.confirmed if outcome else None,
            rounds=outcome.rounds if outcome else 0,
            steps=workflow.transcript if workflow else [],
            usage=run.usage,
            elapsed_s=clock() - started,
            expected=job.expected,
            error=str(failure) if failure else (outcome.failure if outcome else None),
            transient=isinstance(failure, EngineError) and not isinstance(failure, RequestRefused),
        )
        self._tell(JobEnded(job.id, result.answer, result.error, result.elapsed_s))
        return result

    def _begin(self, run: Run, past: Sequence[ReplyRecord]) -> tuple[Workflow, list[RoleCall]]:
        """The workflow after the replies that the job has, and the calls that are due. From its beginning where they do
        not fit: it is another workflow now, or one that does not do the same twice."""
        for recorded in past:
            run.add(recorded.seat, recorded.used)
        workflow = _plugged("the workflow", self.team.begin, run.job.problem)
        due = {call.number: call for call in _plugged("the workflow's begin()", lambda: list(workflow.begin()))}
        for recorded in past:
            call = due.pop(recorded.number, None)
            if call is None or call.seat != recorded.seat:
                self._tell(JobBegunAnew(run.job.id))
                return self._begin(run, ())
            following = _plugged("the workflow's take()", lambda c=call, r=recorded: list(workflow.take(c, r.reply)))  # type: ignore[misc]
            due.update((call.number, call) for call in following)
        return workflow, list(due.values())

    async def _work(self, run: Run, workflow: Workflow, due: list[RoleCall]) -> None:
        """Ask what is due and take what comes, in the order it comes, until the workflow has an outcome."""
        job = run.job
        self._advanced(job, workflow, "", due)
        open_calls: dict[asyncio.Task[ReplyRecord], RoleCall] = {}
        try:
            while workflow.outcome is None:
                if len(due) == 1 and not open_calls:  # the usual case, without a task of its own
                    call = due.pop()
                    due = self._take(job, workflow, call, await self._ask(run, call))
                    continue
                for call in due:
                    task = asyncio.create_task(self._ask(run, call), name=f"{job.id} {call.seat} {call.number}")
                    open_calls[task] = call
                if not open_calls:
                    raise PluginError("the workflow has no outcome and asks for nothing")
                done, _ = await asyncio.wait(open_calls, return_when=asyncio.FIRST_COMPLETED)
                # By number, not as the set has them: the same replies must lead to the same state.
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
        known = len(workflow.transcript)
        due = _plugged("the workflow's take()", lambda: list(workflow.take(call, recorded.reply)))
        entries = tuple(replace(entry) for entry in workflow.transcript[known:])
        self._tell(RoleReplied(job.id, recorded.number, recorded.seat, recorded.reply, recorded.used, entries))
        self._advanced(job, workflow, call.seat, due)
        return due

    def _advanced(self, job: Job, workflow: Workflow, replied: str, due: list[RoleCall]) -> None:
        ahead = _plugged("the workflow's ahead()", workflow.ahead)
        self._tell(JobAdvanced(job.id, replied, Counter(call.seat for call in due), ahead))

    async def _ask(self, run: Run, call: RoleCall) -> ReplyRecord:
        """One request: the role's messages to its engine, the text that comes back to the role."""
        run.check_budget()
        seat = _plugged(f"the workflow calls on {call.seat!r}:", self.team.seats.__getitem__, call.seat)
        request = self._request(run, seat, call)
        used = Usage()
        try:
            text, finish = await self._generate(run.job, seat, request, used)
        finally:
            run.add(seat.name, used)
        try:
            reply = _plugged(f"the role at {seat.name}: parse()", lambda: seat.role.parse(text, call.task))
        except ReplyUnusable as error:
            cut = f" (cut off at {seat.sampling.max_tokens} tokens)" if finish == "length" else ""
            return ReplyRecord(call.number, seat.name, Unusable(f"{error}{cut}"), used)
        return ReplyRecord(call.number, seat.name, reply, used)

    async def _generate(self, job: Job, seat: Seat, request: GenerateRequest, usage: Usage) -> tuple[str, str | None]:
        """The whole reply and why it ended; what it took is added to `usage`, whatever happens."""
        clock = asyncio.get_running_loop().time
        engine = self._engines[seat.engine]
        asked_s, spent = clock(), engine.usage.charged()
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
            spent = engine.usage.charged() - spent
            price = self._price
            cost = None if price is None else price / 3600 * spent.byte_seconds / engine.limits.device_bytes
            seconds = clock() - asked_s
            used = Usage(prompt_tokens, sum(tokens), seconds, spent.byte_seconds, spent.engine_seconds, cost)
            usage.add(used)
        self._tell(CallEnded(job.id, seat.name, seat.engine, asked_s, tuple(times_s), tuple(tokens), prompt_tokens))
        return "".join(pieces), finish

    def _request(self, run: Run, seat: Seat, call: RoleCall) -> GenerateRequest:
        job, sampling = run.job, seat.sampling
        temperature = sampling.temperature if job.temperature is None else job.temperature
        if call.variation:
            temperature = max(temperature, sampling.retry_temperature)
        return GenerateRequest(
            request_id=f"{job.id}/{next(self._requests)}",
            messages=_plugged(f"the role at {seat.name}: messages()", lambda: _messages(seat.role, call.task)),
            temperature=temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop,
            seed=None if job.seed is None or not temperature else _seed(job.seed, call),
            schema=_plugged(f"the role at {seat.name}: schema()", lambda: seat.role.schema(call.task)),
            priority=job.priority,
            since_s=run.since_s,
            stream_interval=self._stream_interval,
        )


def _plugged(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a role or a workflow, which may be a third party's: whatever it raises fails this job and no other."""
    try:
        return function(*args, **kwargs)
    except (TaskRefused, ReplyUnusable):
        raise
    except Exception as error:
        raise PluginError(f"{what} raised {error!r}") from error


def _messages(role: Role, task: Task) -> tuple[Message, ...]:
    messages = tuple(role.messages(task))
    if not messages or not all(isinstance(message, Message) for message in messages):
        raise TypeError(f"{messages!r} is no list of Message")
    return messages


def _seed(seed: int, call: RoleCall) -> int:
    """A seed for one call, from what is asked and not from when: jobs that run beside it do not change a reply."""
    text = f"{seed}/{call.seat}/{call.task!r}/{call.variation}/{call.retries}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
