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
from typing import Self

from runtime.errors import Busy, InputError, JournalError
from runtime.events import Event, JobBegunAnew, RoleReplied
from runtime.jobs import journal as store
from runtime.jobs.feed import Feed
from runtime.jobs.job import JobResult, JobState, entry_as_json
from runtime.jobs.journal import JobEvent, JobRecord, Journal, Transaction
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.recorded import Recorded
from runtime.jobs.submission import Submission
from runtime.jobs.team import Team

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

    feed: Feed

    def __init__(self, path: Path, team: Team, keeping: Keeping | None = None) -> None:
        self.journal = Journal(path, self._committed)
        self.feed = Feed(self.journal)
        self.draining = False
        self._team = team
        self._keeping = keeping or Keeping()
        self._orchestrator: Orchestrator | None = None
        self._queue: list[tuple[int, int, str]] = []
        self._waiting: set[str] = set()
        self._accepting = 0
        self._order = count()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._begun: set[str] = set()
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._failures: dict[str, int] = {}
        self._housekeeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.journal.__aenter__()
        for record in await self.journal.write(Transaction.take_up):
            self._enqueue(record)
        self._housekeeping = asyncio.create_task(self._keep_house(), name="journal housekeeping")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.draining = True
        assert self._housekeeping is not None
        tasks = [self._housekeeping, *self._running.values()]
        for handle in self._deadlines.values():
            handle.cancel()
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
        too many wait; JournalError when it could not be written: then nothing was accepted.
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
        try:
            record, new = await self.journal.write(lambda transaction: transaction.accept(id, submission))
        finally:
            self._accepting -= 1
        if not new:
            return _same(record, submission), False
        self._enqueue(record)
        self._start_due()
        return record, True

    async def cancel(self, id: str) -> JobRecord | None:
        """Cancel a job unless it has ended; returns it as it then is, None where there is none."""
        await self.journal.write(lambda transaction: transaction.move(id, JobState.CANCELLED, why="cancelled"))
        return await self.get(id)

    def cancel_soon(self, id: str) -> None:
        """As `cancel`, for those who cannot wait."""
        self.journal.post(lambda transaction: transaction.move(id, JobState.CANCELLED, why="nobody waits for it"))

    async def get(self, id: str) -> JobRecord | None:
        """A job as the journal has it."""
        return await self.journal.read(partial(store.job, id=id))

    def hear(self, event: Event) -> None:
        """A listener of the orchestrator: replies go to the journal as they come."""
        match event:
            case RoleReplied() if event.job in self._running:
                self.journal.post(partial(_keep, event.job, event.recorded, [entry_as_json(e) for e in event.entries]))
            case JobBegunAnew() if event.job in self._running:
                self.journal.post(lambda transaction: transaction.anew(event.job))

    def _check_room(self) -> None:
        if self.draining:
            raise Busy("the service is ending; submit again when it is back")
        waiting = len(self._waiting) + self._accepting
        if waiting >= self._keeping.queue_max:
            raise Busy(f"the queue is full: {waiting} jobs wait; try again later")

    def _enqueue(self, record: JobRecord) -> None:
        if record.id in self._waiting:
            return
        self._waiting.add(record.id)
        heapq.heappush(self._queue, (record.submission.priority, next(self._order), record.id))
        if record.submission.deadline_s is not None:
            self._end_at(record.id, record.submitted_at + record.submission.deadline_s)

    def _end_at(self, id: str, at: float) -> None:
        """Let a job expire at a time, unless it does before."""
        known = self._deadlines.get(id)
        when = asyncio.get_running_loop().time() + at - time.time()
        if known is None or when < known.when():
            if known is not None:
                known.cancel()
            expire = partial(self._expire, id)
            self._deadlines[id] = asyncio.get_running_loop().call_at(when, expire)

    def _expire(self, id: str) -> None:
        del self._deadlines[id]
        self.journal.post(lambda transaction: transaction.move(id, JobState.EXPIRED, why="its time is over"))

    def _committed(self, events: Sequence[JobEvent]) -> None:
        """Told by the journal of what is on the disk. Jobs that have ended, by whoever's doing, are let go."""
        for event in events:
            if event.kind in (JobState.CANCELLED, JobState.EXPIRED):
                self._waiting.discard(event.job)
                self._forget(event.job)
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
        except JournalError:
            pass  # the journal has logged it; the job is in it, and goes on with the next start
        finally:
            del self._running[id]
            if again is not None and not self.draining:
                self._enqueue(again)
            self._start_due()

    async def _work(self, id: str, orchestrator: Orchestrator) -> JobRecord | None:
        """One try of a job, from its last reply on; the job, where another try is due."""
        begun = await self.journal.write(lambda transaction: transaction.begin(id))
        if begun is None:
            return None
        record, past = begun
        submission = record.submission
        if record.attempts > BEGUN_MAX + submission.retries:
            result = _failed(record, f"work on it began {record.attempts - 1} times and never came to an end")
        else:
            if submission.time_s is not None:
                self._end_at(id, (record.started_at or time.time()) + submission.time_s)
            try:
                result = await orchestrator.run(submission.job(id), past)
            except Exception as error:  # of ours: it fails this job and is told, and the others go on
                logging.getLogger(__name__).exception("job %s", id)
                result = _failed(record, f"an internal error: {error!r}")
        failures = self._failures.get(id, 0)
        if result.transient and failures < submission.retries:
            self._failures[id] = failures + 1
            await asyncio.sleep(min(0.5 * 2**failures, BACKOFF_MAX_S))
            why = result.error or ""
            again = await self._write_surely(lambda transaction: transaction.move(id, JobState.QUEUED, why=why))
            return record if again else None
        self._forget(id)
        state = JobState.DONE if result.error is None else JobState.FAILED
        await self._write_surely(
            lambda transaction: transaction.move(id, state, result.as_json(), why=result.error or "")
        )
        return None

    async def _write_surely(self, do: "store.Do[bool]") -> bool:
        """Write what must not be lost: as often as it takes, where the disk is full."""
        while True:
            try:
                return await self.journal.write(do)
            except JournalError:
                await asyncio.sleep(JOURNAL_RETRY_S)

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
            await asyncio.sleep(FOREIGN_EVERY_S)


def _keep(id: str, recorded: Recorded, entries: list[dict[str, object]], transaction: Transaction) -> None:
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
