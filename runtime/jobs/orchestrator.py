"""Runs workflows over engines: each call of a workflow becomes a request, each reply goes back to it.

Owns nothing that outlives a job. A job never raises for what is wrong with it alone: its result says so, and other
jobs go on.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import ParamSpec, TypeVar

from agents.role import Message, Reply, ReplyUnusable, Role, Task, TaskRefused
from agents.workflow import RoleCall, Unusable, Workflow
from runtime.engines.base import EngineHandle, GenerateRequest
from runtime.errors import EngineError, InputError, PluginError
from runtime.events import JobEnded, Listener, RoleReplied, ignore
from runtime.jobs.job import Job, JobResult, Usage
from runtime.jobs.team import Seat, Team

P = ParamSpec("P")
T = TypeVar("T")


class Orchestrator:
    """Works jobs with one team over the engines that its seats name; any number of jobs at once."""

    def __init__(self, team: Team, engines: Mapping[str, EngineHandle], listener: Listener = ignore) -> None:
        self.team = team
        self._engines = engines
        self._tell = listener
        self._requests = count()

    async def run(self, job: Job) -> JobResult:
        """Work one job to its end. Cancelling it aborts its open requests."""
        started = time.monotonic()
        usage: dict[str, Usage] = {}
        workflow: Workflow | None = None
        error: str | None = None
        try:
            self.team.check(job.problem)
            workflow = _plugged("the workflow", self.team.begin, job.problem)
            await self._work(job, workflow, usage)
        except (EngineError, InputError, PluginError, TaskRefused) as refusal:
            error = str(refusal)
        outcome = workflow.outcome if workflow else None
        result = JobResult(
            id=job.id,
            problem=job.problem,
            answer=outcome.answer if outcome else None,
            confirmed=outcome.confirmed if outcome else None,
            rounds=outcome.rounds if outcome else 0,
            steps=workflow.transcript if workflow else [],
            usage=usage,
            elapsed_s=time.monotonic() - started,
            expected=job.expected,
            error=error or (outcome.failure if outcome else None),
        )
        self._tell(JobEnded(job.id, result.answer, result.error, result.elapsed_s))
        return result

    async def _work(self, job: Job, workflow: Workflow, usage: dict[str, Usage]) -> None:
        """Ask what is due and take what comes, in the order it comes, until the workflow has an outcome."""
        due = _plugged("the workflow's begin()", lambda: list(workflow.begin()))
        open_calls: dict[asyncio.Task[Reply | Unusable], RoleCall] = {}
        try:
            while workflow.outcome is None:
                if len(due) == 1 and not open_calls:  # the usual case, without a task of its own
                    call = due.pop()
                    due = self._take(job, workflow, call, await self._ask(job, call, usage))
                    continue
                for call in due:
                    task = asyncio.create_task(self._ask(job, call, usage), name=f"{job.id} {call.seat} {call.number}")
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

    def _take(self, job: Job, workflow: Workflow, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        known = len(workflow.transcript)
        due = _plugged("the workflow's take()", lambda: list(workflow.take(call, reply)))
        for entry in workflow.transcript[known:]:
            self._tell(RoleReplied(job.id, replace(entry)))
        return due

    async def _ask(self, job: Job, call: RoleCall, usage: dict[str, Usage]) -> Reply | Unusable:
        """One request: the role's messages to its engine, the text that comes back to the role."""
        seat = _plugged(f"the workflow calls on {call.seat!r}:", self.team.seats.__getitem__, call.seat)
        request = self._request(job, seat, call)
        spent = usage.setdefault(seat.name, Usage())
        started = time.monotonic()
        pieces: list[str] = []
        finish: str | None = None
        async with aclosing(self._engines[seat.engine].generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if not pieces:
                    spent.prompt_tokens += chunk.prompt_tokens
                spent.completion_tokens += len(chunk.token_ids)
                pieces.append(chunk.text)
                finish = chunk.finish
        spent.seconds += time.monotonic() - started
        try:
            return _plugged(f"the role at {seat.name}: parse()", lambda: seat.role.parse("".join(pieces), call.task))
        except ReplyUnusable as error:
            cut = f" (cut off at {seat.sampling.max_tokens} tokens)" if finish == "length" else ""
            return Unusable(f"{error}{cut}")

    def _request(self, job: Job, seat: Seat, call: RoleCall) -> GenerateRequest:
        sampling = seat.sampling
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
