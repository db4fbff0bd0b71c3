"""Accepts jobs and sees each to its end, over crashes of engines and of this process.

The way of a job: `submit` returns once it is in the journal; it waits its turn by priority; its replies go to the
journal as they come; its end is written once. Whatever ends a job from outside (a user's cancel, here or from
another process, or a deadline) is a state in the journal first, and the work stops because of it.
"""

import asyncio
import heapq
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Self, TypeVar

from runtime.errors import Busy, InputError, JournalError
from runtime.events import Event, JobBegunAnew, RoleReplied
from runtime.jobs import journal as store
from runtime.jobs.event_stream import ENDS, EventStream
from runtime.jobs.job import JobResult, JobState, entry_as_json
from runtime.jobs.journal import Begun, JobEvent, JobRecord, Journal, Transaction
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.submission import Submission
from runtime.jobs.team import Team

T = TypeVar("T")

FOREIGN_EVERY_S = 0.5
"""How soon a cancel from another process is seen."""
FORGET_EVERY_S = 60.0
JOURNAL_RETRY_S = 1.0
BACKOFF_MAX_S = 30.0
BEGUN_MAX = 20
"""A job whose work began so often and never ended, retries apart, is what ends the runtime: it fails."""


@dataclass(frozen=True)
class Keeping:
    """How many jobs are worked at once, how many may wait, and how long those that ended are kept."""

    jobs_at_once: int = 64
    queue_max: int = 10_000
    days: float = 30.0
    jobs: int = 1_000_000


class JobService:
    """An async context manager over the journal of jobs. Jobs are accepted from the moment it is entered, and worked
    from `use` on. Leaving it stops what is under way; the next start goes on with that."""

    feed: EventStream

    def __init__(self, path: Path, team: Team, keeping: Keeping | None = None) -> None:
        self.journal = Journal(path, self._committed)
        self.feed = EventStream(self.journal)
        self.draining = False
        self._team = team
        self._keeping = keeping or Keeping()
        self._orchestrator: Orchestrator | None = None
        self._queue: list[tuple[int, int, str]] = []
        self._waiting: set[str] = set()
        self._accepting = 0
        self._order = count()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._failures: dict[str, int] = {}
        self._writing: set[asyncio.Task[bool]] = set()
        self._housekeeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.journal.__aenter__()
        try:
            for record in await self.journal.write(Transaction.take_up):
                self._enqueue(record)
        except BaseException as error:
            await self.journal.__aexit__(None, None, None)
            if isinstance(error, ValueError):
                raise JournalError(f"{self.journal.path}: a job in it cannot be read: {error}") from error
            raise
        self._housekeeping = asyncio.create_task(self._keep_house(), name="journal housekeeping")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.draining = True
        assert self._housekeeping is not None
        for handle in self._deadlines.values():
            handle.cancel()
        tasks = [self._housekeeping, *self._running.values(), *self._writing]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self.journal.__aexit__(*exc)

    def use(self, orchestrator: Orchestrator) -> None:
        """The engines are up: begin."""
        self._orchestrator = orchestrator
        self._start_due()

    async def drain(self, seconds: float) -> int:
        """Accept and begin no more; let what runs end within a time. Returns how many are left to the next start."""
        self.draining = True
        if self._running:
            await asyncio.wait(self._running.values(), timeout=seconds)
        return len(self._running) + len(self._waiting)

    @property
    def counts(self) -> dict[JobState, int]:
        """Jobs that wait and that are worked."""
        return {JobState.QUEUED: len(self._waiting), JobState.RUNNING: len(self._running)}

    async def submit(self, submission: Submission) -> tuple[JobRecord, bool]:
        """Accept a job; or find the one of the same idempotency key. Returns it, and whether it is new.

        Raises InputError for a problem that the team could not work, or a key that stands for something else; Busy when
        too many wait; JournalError when it could not be written: then nothing was accepted. A caller that is cancelled
        leaves either nothing or a job that will be worked.
        """
        try:
            self._check_room()
        except Busy:
            if submission.idempotency_key is None:
                raise
            known = await self.journal.read(partial(store.job_of_key, key=submission.idempotency_key))
            if known is None:
                raise
            return _same(known, submission), False
        self._team.check(submission.problem)
        id = uuid.uuid4().hex
        self._accepting += 1
        accepting = self.journal.post(lambda transaction: transaction.accept(id, submission))
        accepting.add_done_callback(self._accepted)
        # Shielded: the write is done in any case, so a caller that leaves now must not take the job's turn with it.
        record, new = await asyncio.shield(accepting)
        return record if new else _same(record, submission), new

    async def cancel(self, id: str) -> JobRecord | None:
        """Cancel a job unless it has ended; returns it as it then is, None where there is none."""
        await self.journal.write(lambda transaction: transaction.move(id, JobState.CANCELLED, why="cancelled"))
        return await self.get(id)

    def cancel_soon(self, id: str) -> None:
        """Cancel a job without waiting for the journal."""
        self._write_soon(lambda transaction: transaction.move(id, JobState.CANCELLED, why="nobody waits for it"))

    async def get(self, id: str) -> JobRecord | None:
        """A job as the journal has it."""
        return await self.journal.read(partial(store.job, id=id))

    def hear(self, event: Event) -> None:
        """A listener of the orchestrator: replies go to the journal as they come."""
        match event:
            case RoleReplied() if event.job in self._running:
                self.journal.post(
                    partial(_keep, event.job, ReplyRecord.of(event), [entry_as_json(e) for e in event.entries])
                )
            case JobBegunAnew() if event.job in self._running:
                self.journal.post(lambda transaction: transaction.anew(event.job))

    def _check_room(self) -> None:
        if self.draining:
            raise Busy("the service is ending; submit again when it is back")
        waiting = len(self._waiting) + self._accepting
        if waiting >= self._keeping.queue_max:
            raise Busy(f"the queue is full: {waiting} jobs wait; try again later")

    def _accepted(self, accepting: "asyncio.Future[tuple[JobRecord, bool]]") -> None:
        """Queue a job once it is in the journal, whether or not its caller still waits."""
        self._accepting -= 1
        if accepting.exception() is None:
            record, new = accepting.result()
            if new:
                self._enqueue(record)
                self._start_due()

    def _enqueue(self, record: JobRecord) -> None:
        if record.id in self._waiting:
            return
        self._waiting.add(record.id)
        heapq.heappush(self._queue, (record.submission.priority, next(self._order), record.id))
        if record.submission.deadline_s is not None and record.id not in self._deadlines:
            left_s = record.submitted_at + record.submission.deadline_s - time.time()
            self._deadlines[record.id] = self._expire_in(left_s, record.id)

    def _expire_in(self, seconds: float, id: str) -> asyncio.TimerHandle:
        """Let a job expire after a time, unless the handle is cancelled before."""
        move = partial(Transaction.move, id=id, state=JobState.EXPIRED, why="its time is over")
        return asyncio.get_running_loop().call_later(max(seconds, 0), self._write_soon, move)

    def _committed(self, events: Sequence[JobEvent]) -> None:
        """Told by the journal of what is on the disk. Jobs that have ended, by whoever's doing, are let go."""
        for event in events:
            if event.kind in ENDS:
                self._forget(event.job)
            if event.kind in (JobState.CANCELLED, JobState.EXPIRED):
                self._waiting.discard(event.job)
                if task := self._running.get(event.job):
                    task.cancel()
        self.feed.publish(events)

    def _forget(self, id: str) -> None:
        self._failures.pop(id, None)
        if handle := self._deadlines.pop(id, None):
            handle.cancel()

    def _start_due(self) -> None:
        """Begin with as many as may be worked, the most urgent first."""
        while self._queue and self._orchestrator and not self.draining:
            if len(self._running) >= self._keeping.jobs_at_once:
                return
            _, _, id = heapq.heappop(self._queue)
            if id in self._waiting:  # and was not cancelled meanwhile
                self._waiting.discard(id)
                self._running[id] = asyncio.create_task(self._run(id, self._orchestrator), name=f"job {id}")

    async def _run(self, id: str, orchestrator: Orchestrator) -> None:
        again: JobRecord | None = None
        try:
            again = await self._work(id, orchestrator)
        except Exception as error:  # a defect of ours: it fails this job, and the others are worked
            logging.getLogger(__name__).exception("job %s", id)
            why = f"an internal error: {error!r}"
            self._write_soon(lambda transaction: transaction.move(id, JobState.FAILED, why=why))
        finally:
            del self._running[id]
            if again is not None and not self.draining:
                self._enqueue(again)
            self._start_due()

    async def _work(self, id: str, orchestrator: Orchestrator) -> JobRecord | None:
        """Work a job from its last reply on. Return it if it is to be tried again, None if it has ended."""
        begun = await self._write_surely(lambda transaction: transaction.begin(id))
        if begun is None:
            return None
        record = begun.record
        result = await self._try(begun, orchestrator)
        failures = self._failures.get(id, 0)
        if result.transient and failures < record.submission.retries:
            self._failures[id] = failures + 1
            why = result.error or ""
            again = await self._write_surely(lambda transaction: transaction.move(id, JobState.QUEUED, why=why))
            await asyncio.sleep(min(0.5 * 2**failures, BACKOFF_MAX_S))
            return record if again else None
        self._forget(id)  # its result counts, also if it is written only after the deadline
        state = JobState.DONE if result.error is None else JobState.FAILED
        await self._write_surely(
            lambda transaction: transaction.move(id, state, result.as_json(), why=result.error or "")
        )
        return None

    async def _try(self, begun: Begun, orchestrator: Orchestrator) -> JobResult:
        """Run a job's workflow within what is left of its time budget. An exception of ours fails this job alone."""
        record, submission = begun.record, begun.record.submission
        if record.attempts > BEGUN_MAX + submission.retries:
            return _failed(record, f"work on it began {record.attempts - 1} times and never came to an end")
        budget = None
        if submission.time_s is not None:
            budget = self._expire_in(submission.time_s - begun.worked_s, record.id)
        try:
            return await orchestrator.run(submission.job(record.id), begun.past)
        except Exception as error:
            logging.getLogger(__name__).exception("job %s", record.id)
            return _failed(record, f"an internal error: {error!r}")
        finally:
            if budget is not None:
                budget.cancel()

    async def _write_surely(self, do: "store.Do[T]") -> T:
        """Write what must not be lost. Try again until the journal takes it, for example while the disk is full."""
        while True:
            try:
                return await self.journal.write(do)
            except JournalError:
                await asyncio.sleep(JOURNAL_RETRY_S)

    def _write_soon(self, do: "store.Do[bool]") -> None:
        """Write what must not be lost, in a task of its own."""
        task = asyncio.create_task(self._write_surely(do), name="journal write")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _keep_house(self) -> None:
        """See what other processes wrote, and forget what is too old."""
        forget_at = 0.0
        while True:
            try:
                await self.journal.write(Transaction.catch_up)
                if time.monotonic() >= forget_at:
                    before = time.time() - self._keeping.days * 86400
                    keep = self._keeping.jobs
                    gone = await self.journal.write(lambda transaction: transaction.forget(before, keep))  # noqa: B023
                    if not gone:  # else at once some more
                        forget_at = time.monotonic() + FORGET_EVERY_S
            except JournalError as error:
                logging.getLogger(__name__).warning("%s", error)
            except Exception:  # a defect of ours; the next look may succeed
                logging.getLogger(__name__).exception("housekeeping of the journal")
            await asyncio.sleep(FOREIGN_EVERY_S)


def _keep(id: str, recorded: ReplyRecord, entries: list[dict[str, object]], transaction: Transaction) -> None:
    transaction.replied(id, recorded, entries)


def _same(record: JobRecord, submission: Submission) -> JobRecord:
    """The job of a key. Raises InputError where it is another than what is submitted."""
    if record.submission != submission:
        raise InputError(
            f"idempotency_key: {submission.idempotency_key!r} was used for another submission (job {record.id}); "
            "give each its own"
        )
    return record


def _failed(record: JobRecord, why: str) -> JobResult:
    return JobResult(record.id, record.submission.problem, None, error=why, expected=record.submission.expected)
