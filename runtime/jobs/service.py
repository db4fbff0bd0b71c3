"""Accepts jobs and works each to its end, across crashes of engines and of this process.

A job is synced to the journal before `submit` returns. It waits its turn by priority, its replies go to the journal as
they come, and its end is written once. A cancellation (from here or from another process) or an expiry is written to
the journal first, and only then stops the work.
"""

import asyncio
import heapq
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Self

from runtime.config import Service
from runtime.errors import Busy, InputError, JournalError, NotFound
from runtime.events import Event, JobRestarted, RoleReplied, ToolCalled, ToolReturned
from runtime.jobs.event_stream import ENDS, EventStream
from runtime.jobs.job import JobResult, JobState, entry_as_json
from runtime.jobs.journal import queries
from runtime.jobs.journal.journal import Journal
from runtime.jobs.journal.records import JobEvent, JobRecord, StartedJob
from runtime.jobs.journal.transaction import Transaction
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.retry_policy import RetryPolicy
from runtime.jobs.submission import Submission
from runtime.jobs.team import Team
from runtime.jobs.tool_record import ToolRecord

CATCH_UP_EVERY_S = 0.5
"""Seconds between two looks for writes of other processes, such as `troupe jobs cancel`."""
DELETE_EVERY_S = 60.0
"""Seconds between two deletions of ended jobs that the service need not keep."""
DAY_S = 86_400


class JobService:
    """An async context manager over the journal of jobs.

    It accepts jobs as soon as it is entered, and works them once `use` has given it an orchestrator. Leaving it stops
    the jobs that run; the next start resumes them. `settings` bounds how many jobs run and wait, and how long ended
    jobs are kept.
    """

    events: EventStream

    def __init__(self, path: Path, team: Team, settings: Service | None = None) -> None:
        self.journal = Journal(path, self._on_commit)
        self.events = EventStream(self.journal)
        self.draining = False
        self._ended = {state: 0 for state in JobState if state.ended}
        self._team = team
        self._settings = settings or Service()
        self._orchestrator: Orchestrator | None = None
        self._wake_s: Callable[[], float] = lambda: 0.0
        self._queue: list[tuple[int, int, str]] = []
        self._waiting: set[str] = set()
        self._accepting = 0
        self._order = count()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._failures: dict[str, int] = {}
        self._maintenance: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.journal.__aenter__()
        try:
            for record in await self.journal.write(Transaction.requeue_interrupted):
                self._enqueue(record)
        except BaseException as error:
            await self.journal.__aexit__(None, None, None)
            if isinstance(error, ValueError):
                raise JournalError(f"{self.journal.path}: a job in it cannot be read: {error}") from error
            raise
        self._maintenance = asyncio.create_task(self._maintain_journal(), name="journal maintenance")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
        for timer in self._deadlines.values():
            timer.cancel()
        assert self._maintenance is not None
        self._maintenance.cancel()
        await asyncio.wait([self._maintenance])
        await self.journal.__aexit__(*exc)

    def use(self, orchestrator: Orchestrator, wake_s: Callable[[], float] = lambda: 0.0) -> None:
        """Start to work the queued jobs; the orchestrator's engines have started.

        `wake_s` returns how long a job would wait for its first engine to wake.
        """
        self._orchestrator = orchestrator
        self._wake_s = wake_s
        self._start_queued()

    async def drain(self, seconds: float) -> int:
        """Accept and start no more jobs, and wait up to `seconds` for the running ones.

        Returns the number of jobs that are left for the next start.
        """
        self.draining = True
        if self._running:
            await asyncio.wait(self._running.values(), timeout=seconds)
        return len(self._running) + len(self._waiting)

    async def stop(self) -> None:
        """Accept and start no more jobs, and interrupt the running ones. The next start resumes them.

        Call this before the engines and tools close: a job would take their end for its own failure.
        """
        self.draining = True
        running = list(self._running.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    @property
    def counts(self) -> dict[JobState, int]:
        """The number of jobs that are queued, and that run."""
        return {JobState.QUEUED: len(self._waiting), JobState.RUNNING: len(self._running)}

    @property
    def ended(self) -> dict[JobState, int]:
        """The number of jobs that ended since this service started, by state. Deleted jobs still count."""
        return dict(self._ended)

    async def submit(self, submission: Submission) -> tuple[JobRecord, bool]:
        """Accept a job, or find the one with the same idempotency key. Return it, and True if it is new.

        Raises InputError if the team cannot work the problem, or if the key belongs to another submission; Busy if the
        queue is full, the service is stopping, or no engine can wake before the job's deadline; JournalError if the
        job could not be written, and so is not accepted. If the caller is cancelled, the job is either written and
        worked, or it does not exist.
        """
        try:
            self._check_room()
            self._check_deadline(submission)
        except Busy:
            if submission.idempotency_key is None:
                raise
            known = await self.journal.read(partial(queries.job_of_key, key=submission.idempotency_key))
            if known is None:
                raise
            return _check_same(known, submission), False
        self._team.check(submission.problem, submission.compare)
        id = secrets.token_hex(16)  # all bits random, so that it can be the id of a trace
        self._accepting += 1
        accepting = self.journal.post(lambda transaction: transaction.accept(id, submission))
        accepting.add_done_callback(self._on_accepted)
        # The job is written even if the caller is cancelled now. Without the shield, it would not be queued then.
        record, new = await asyncio.shield(accepting)
        return record if new else _check_same(record, submission), new

    async def cancel(self, id: str) -> JobRecord:
        """Cancel a job unless it has ended. Return it as it is afterwards. Raises NotFound if there is no such job."""
        await self.journal.write(lambda transaction: transaction.move(id, JobState.CANCELLED, why="cancelled"))
        return await self.find(id)

    def cancel_soon(self, id: str) -> None:
        """Cancel a job whose caller has disconnected, without waiting for the journal."""
        cancel = partial(Transaction.move, id=id, state=JobState.CANCELLED, why="its caller disconnected")
        self.journal.post(cancel, job=id)

    async def get(self, id: str) -> JobRecord | None:
        """Return a job as the journal has it, or None if there is no such job."""
        return await self.journal.read(partial(queries.job, id=id))

    async def find(self, id: str) -> JobRecord:
        """Return a job as the journal has it. Raises NotFound if there is no such job."""
        record = await self.get(id)
        if record is None:
            raise NotFound(f"there is no job {id[:100]!r}")
        return record

    def on_event(self, event: Event) -> None:
        """Write the replies of running jobs to the journal. Register this as a listener of the orchestrator."""
        match event:
            case RoleReplied() if event.job in self._running:
                reply, entries = ReplyRecord.of(event), [entry_as_json(entry) for entry in event.entries]
                self.journal.post(
                    partial(Transaction.add_reply, id=event.job, reply=reply, entries=entries), job=event.job
                )
            case JobRestarted() if event.job in self._running:
                self.journal.post(partial(Transaction.restart, id=event.job), job=event.job)

    def _check_room(self) -> None:
        if self.draining:
            raise Busy("the service is stopping; submit again when it has restarted")
        waiting = len(self._waiting) + self._accepting
        if waiting >= self._settings.queue_max:
            raise Busy(f"the queue is full: {waiting} jobs wait (service.queue_max); try again later")

    def _check_deadline(self, submission: Submission) -> None:
        wake_s = self._wake_s() if submission.deadline_s is not None else 0.0
        if submission.deadline_s is not None and submission.deadline_s < wake_s:
            raise Busy(
                f"deadline_s: the first engine wakes in {wake_s:.1f} s, which is after the deadline of "
                f"{submission.deadline_s:g} s; submit the job again then, or give it more time",
                retry_s=wake_s,
            )

    def _on_accepted(self, accepting: "asyncio.Future[tuple[JobRecord, bool]]") -> None:
        """Queue a job once it is in the journal, even if its caller no longer waits."""
        self._accepting -= 1
        if accepting.exception() is None:
            record, new = accepting.result()
            if new:
                self._enqueue(record)
                self._start_queued()

    def _enqueue(self, record: JobRecord) -> None:
        if record.id in self._waiting:
            return
        self._waiting.add(record.id)
        heapq.heappush(self._queue, (record.submission.priority, next(self._order), record.id))
        if record.submission.deadline_s is not None and record.id not in self._deadlines:
            remaining_s = record.submitted_at + record.submission.deadline_s - time.time()
            self._deadlines[record.id] = self._expire_in(remaining_s, record.id, "its deadline_s has passed")

    def _expire_in(self, seconds: float, id: str, why: str) -> asyncio.TimerHandle:
        """Start a timer that lets a job expire unless it is cancelled before."""
        expire = partial(Transaction.move, id=id, state=JobState.EXPIRED, why=why)
        return asyncio.get_running_loop().call_later(max(seconds, 0), partial(self.journal.post, expire, job=id))

    def _on_commit(self, events: Sequence[JobEvent]) -> None:
        """Stop working the jobs that ended, even if another process ended them, and publish the events."""
        for event in events:
            if event.kind in ENDS:
                self._ended[JobState(event.kind)] += 1
                self._forget(event.job)
            if event.kind in (JobState.CANCELLED, JobState.EXPIRED):
                self._waiting.discard(event.job)
                if task := self._running.get(event.job):
                    task.cancel()
        self.events.publish(events)

    def _forget(self, id: str) -> None:
        """Drop the failure count and the deadline of a job that has ended."""
        self._failures.pop(id, None)
        if timer := self._deadlines.pop(id, None):
            timer.cancel()

    def _start_queued(self) -> None:
        """Start queued jobs while there is room, the most urgent first."""
        while self._queue and self._orchestrator and not self.draining:
            if len(self._running) >= self._settings.jobs_at_once:
                return
            _, _, id = heapq.heappop(self._queue)
            if id in self._waiting:  # else it ended while it was queued
                self._waiting.discard(id)
                running = asyncio.create_task(self._run(id, self._orchestrator), name=f"job {id}")
                running.add_done_callback(partial(self._on_stopped, id))
                self._running[id] = running

    def _on_stopped(self, id: str, running: asyncio.Task[None]) -> None:
        """Give the place of a job to the next one, also if the job was cancelled before its task has begun.

        A job that is tried again may already run in a new task.
        """
        if self._running.get(id) is running:
            del self._running[id]
        self._start_queued()

    async def _run(self, id: str, orchestrator: Orchestrator) -> None:
        """Work a job in its task. A defect of ours fails this job and no other."""
        try:
            await self._work(id, orchestrator)
        except Exception as error:
            logging.getLogger(__name__).exception("job %s", id)
            fail = partial(Transaction.move, id=id, state=JobState.FAILED, why=f"an internal error: {error!r}")
            self.journal.post(fail, job=id)

    async def _work(self, id: str, orchestrator: Orchestrator) -> None:
        """Try a job once, from its last reply on. Then write its result, or queue it for another try."""
        started = await self.journal.write(lambda transaction: transaction.start(id), job=id)
        if started is None:  # it ended while it was queued
            return
        result = await self._try(started, orchestrator)
        failures = self._failures.get(id, 0)
        backoff_s = _retry_policy(started).backoff_s(failures) if result.transient else None
        if backoff_s is None:
            await self._end(result)
        else:
            self._failures[id] = failures + 1
            await self._queue_again(started.record, result.error or "", backoff_s)

    async def _try(self, started: StartedJob, orchestrator: Orchestrator) -> JobResult:
        """Run a job's workflow within the rest of its time budget."""
        record, submission = started.record, started.record.submission
        if not _retry_policy(started).allows_start(record.attempts):
            return _failed(record, f"the job started {record.attempts - 1} times without ending; Troupe gives up")
        budget_timer = None
        if submission.time_s is not None:
            remaining_s = submission.time_s - started.worked_s
            budget_timer = self._expire_in(remaining_s, record.id, "its time_s is used up")
        try:
            return await orchestrator.run(submission.job(record.id), started.replies, started.tools, self._log_tool)
        except Exception as error:  # a defect of ours
            logging.getLogger(__name__).exception("job %s", record.id)
            return _failed(record, f"an internal error: {error!r}")
        finally:
            if budget_timer is not None:
                budget_timer.cancel()

    async def _log_tool(self, event: ToolCalled | ToolReturned) -> None:
        """Write a tool call, or its output, to the journal. Return once it is on the disk."""
        match event:
            case ToolCalled():
                call = ToolRecord(event.number, event.seat, event.task, event.call, event.usage)
                await self.journal.write(lambda t: t.add_tool_call(event.job, call), job=event.job)
            case ToolReturned():
                await self.journal.write(
                    lambda t: t.add_tool_use(event.job, event.number, event.seat, event.use), job=event.job
                )

    async def _end(self, result: JobResult) -> None:
        """Write a job's result. It counts even if it can be written only after the deadline."""
        self._forget(result.id)
        state = JobState.DONE if result.error is None else JobState.FAILED
        await self.journal.write(
            lambda transaction: transaction.move(result.id, state, result.as_json(), why=result.error or ""),
            job=result.id,
        )

    async def _queue_again(self, record: JobRecord, why: str, backoff_s: float) -> None:
        """Queue a job for another try after a backoff, during which it keeps its place among the running jobs."""
        queued = await self.journal.write(
            lambda transaction: transaction.move(record.id, JobState.QUEUED, why=why), job=record.id
        )
        await asyncio.sleep(backoff_s)
        if queued:
            self._enqueue(record)

    async def _maintain_journal(self) -> None:
        """Read what other processes wrote, and delete ended jobs that are too old or too many."""
        delete_at = 0.0
        while True:
            try:
                await self.journal.write(Transaction.catch_up)
                if time.monotonic() >= delete_at and not await self._delete_ended():
                    delete_at = time.monotonic() + DELETE_EVERY_S
            except JournalError as error:
                logging.getLogger(__name__).warning("%s", error)
            except Exception:  # a defect of ours; the next turn may succeed
                logging.getLogger(__name__).exception("maintenance of the journal")
            await asyncio.sleep(CATCH_UP_EVERY_S)

    async def _delete_ended(self) -> int:
        """Delete some of the ended jobs that need not be kept. Return how many."""
        ended_before = time.time() - self._settings.keep_days * DAY_S
        delete = partial(Transaction.delete_ended, ended_before=ended_before, keep=self._settings.keep_jobs)
        return await self.journal.write(delete)


def _retry_policy(started: StartedJob) -> RetryPolicy:
    return RetryPolicy(started.record.submission.retries)


def _check_same(record: JobRecord, submission: Submission) -> JobRecord:
    """Return the job of an idempotency key. Raises InputError if it was made from another submission."""
    if record.submission != submission:
        raise InputError(
            f"idempotency_key: {submission.idempotency_key!r} was used for another submission (job {record.id}); "
            "use a new key"
        )
    return record


def _failed(record: JobRecord, why: str) -> JobResult:
    asked = record.submission
    return JobResult(record.id, asked.problem, None, error=why, expected=asked.expected, compare=asked.compare)
