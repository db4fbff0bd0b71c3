"""Owns the journal's writer thread, and with it durability: a write that has returned is on the disk.

One thread writes. It commits all writes that wait in one transaction (group commit), so that a thousand jobs a second
cost a few dozen disk syncs. Readers never wait for it, because SQLite's WAL mode lets them read beside a writer.
"""

import asyncio
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Generic, Self, TextIO, TypeVar

from runtime.errors import JournalError
from runtime.jobs.journal import queries
from runtime.jobs.journal.database import Connection, connect, lock, roll_back, translate_errors
from runtime.jobs.journal.records import JobEvent
from runtime.jobs.journal.transaction import Transaction, Write

T = TypeVar("T")

TRANSACTION_MAX_WRITES = 1000
RETRY_S = 1.0
"""Seconds between two tries of the failed writes of jobs."""


@dataclass(frozen=True)
class _PendingWrite(Generic[T]):
    """A write that waits for its transaction, and the future that its caller holds.

    `number` counts the writes in the order in which they are posted. `job` names the job whose writes must not be lost.
    It is None for a write that may fail.
    """

    number: int
    write: Write[T]
    done: asyncio.Future[T]
    job: str | None


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a write: its return value, or the error that it failed with."""

    value: Any = None
    error: Exception | None = None

    def must_be_retried(self, pending: _PendingWrite[Any]) -> bool:
        """Return True if this is a fault of the file, and the write must not be lost."""
        return pending.job is not None and isinstance(self.error, JournalError)


@dataclass(frozen=True)
class _Committed:
    """A transaction that is over: an outcome for each write, the events to publish, and the id of the last of them."""

    outcomes: Sequence[_Outcome]
    events: Sequence[JobEvent]
    last_event: int


class Journal:
    """An async context manager that holds a journal open for the one service that works its jobs.

    Entering raises JournalError if another service holds the file, or if it is damaged or cannot be written. Leaving
    tries every write that was posted, and once more those that have failed, then closes the file. Writes that fail even
    then are given up.

    A write of a `job` is not lost: it is kept in memory and tried until the file takes it, and the job's later writes
    wait behind it. Any other write fails at the first fault of the file.

    `on_commit` is called on the event loop with the events of each transaction, once they are on the disk. `fault` is
    the file's error if the latest transaction met one or a job's write waits for its next try, else None.
    """

    def __init__(self, path: Path, on_commit: Callable[[Sequence[JobEvent]], None] = lambda events: None) -> None:
        self.path = path
        self.fault: str | None = None
        self._on_commit = on_commit
        self._writes: queue.SimpleQueue[_PendingWrite[Any] | None] = queue.SimpleQueue()
        self._numbers = count()
        self._failed: list[_PendingWrite[Any]] = []  # of jobs, for the next try; only the writer thread uses it
        self._retry_at = 0.0
        self._last_event = 0
        self._thread: threading.Thread | None = None
        self._lock: TextIO | None = None
        self._reader: Connection | None = None
        self._reading = threading.Lock()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        writer = await asyncio.to_thread(self._open)
        self._thread = threading.Thread(target=self._run_writer, args=(writer,), name="journal", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writes.put(None)
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)
        assert self._reader is not None
        self._reader.close()
        assert self._lock is not None
        self._lock.close()

    async def write(self, write: Write[T], *, job: str | None = None) -> T:
        """Run a write in a transaction, and return what it returns once the transaction is on the disk.

        The write is done even if the caller is cancelled. Raises JournalError if the file cannot be written and the
        write belongs to no `job`, or what `write` itself raises; in both cases nothing of it is written.
        """
        return await asyncio.shield(self.post(write, job=job))

    def post(self, write: Write[T], *, job: str | None = None) -> asyncio.Future[T]:
        """Queue a write without waiting for it. Writes are done in the order in which they are posted."""
        pending = _PendingWrite(next(self._numbers), write, self._loop.create_future(), job)
        pending.done.add_done_callback(_mark_retrieved)
        self._writes.put(pending)
        return pending.done

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query in a thread. Raises JournalError."""

        def run() -> T:
            assert self._reader is not None
            with self._reading, translate_errors(self.path):
                return query(self._reader)

        return await asyncio.to_thread(run)

    def _open(self) -> Connection:
        """Lock the file and open both connections. Return the writer's."""
        with translate_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = lock(self.path)
            try:
                writer = connect(self.path)
                self._reader = connect(self.path)
            except BaseException:
                self._lock.close()
                raise
            return writer

    def _run_writer(self, connection: Connection) -> None:
        """Commit transaction after transaction, in the writer thread."""
        with closing(connection):
            self._last_event = queries.last_event(connection)
            while (writes := self._next_writes()) is not None:
                if writes:
                    self._transact(connection, writes)
                else:
                    self._retry(connection)
            if self._failed:
                self._retry(connection)

    def _transact(self, connection: Connection, writes: Sequence[_PendingWrite[Any]]) -> None:
        """Do the writes in one transaction, keep those that must be retried, and report the others to their callers."""
        committed = self._commit(connection, writes)
        self._last_event = committed.last_event
        self._keep_failed(writes, committed.outcomes)
        self._update_fault(committed.outcomes)
        with suppress(RuntimeError):  # the event loop is closed, so no caller waits
            self._loop.call_soon_threadsafe(self._report, writes, committed)

    def _retry(self, connection: Connection) -> None:
        """Try the failed writes again, apart from new ones: a full disk may fail all writes of a transaction.

        If some fail together, try each job's alone, so that a large write does not block those of other jobs. Stop
        after RETRY_S, because new writes wait meanwhile.
        """
        stop_at = time.monotonic() + RETRY_S
        failed, self._failed = sorted(self._failed, key=lambda pending: pending.number), []
        self._transact(connection, failed)
        jobs = list(dict.fromkeys(pending.job for pending in self._failed))
        random.shuffle(jobs)  # so that a job that takes all the time does not always come before the others
        for job in jobs if len(jobs) > 1 else ():
            if time.monotonic() >= stop_at:
                break
            alone = [pending for pending in self._failed if pending.job == job]
            self._failed = [pending for pending in self._failed if pending.job != job]
            self._transact(connection, alone)
        self._retry_at = time.monotonic() + RETRY_S

    def _next_writes(self) -> list[_PendingWrite[Any]] | None:
        """Wait for a write; return it and those queued behind it. Return None when the journal is left.

        Return an empty list once failed writes are due again.
        """
        wait_s = max(self._retry_at - time.monotonic(), 0) if self._failed else None
        if wait_s != 0:
            with suppress(queue.Empty):
                first = self._writes.get(timeout=wait_s)
                return None if first is None else self._with_following(first)
        return []

    def _with_following(self, first: _PendingWrite[Any]) -> list[_PendingWrite[Any]]:
        """Return a write and those queued behind it."""
        writes = [first]
        with suppress(queue.Empty):
            while len(writes) < TRANSACTION_MAX_WRITES:
                following = self._writes.get_nowait()
                if following is None:
                    self._writes.put(None)  # commit these first, and stop at the next call
                    break
                writes.append(following)
        return writes

    def _commit(self, connection: Connection, writes: Sequence[_PendingWrite[Any]]) -> _Committed:
        """Do the writes in one transaction. A failed COMMIT fails all of them.

        A write that fails is undone alone. If it must be retried, the later writes of its job fail too.
        """
        transaction = Transaction(connection, self._last_event)
        outcomes: list[_Outcome] = []
        blocked, waits = {pending.job for pending in self._failed}, _Outcome(error=JournalError(self.fault))
        try:
            with translate_errors(self.path):
                connection.execute("BEGIN IMMEDIATE")
                for pending in writes:
                    outcome = waits if pending.job in blocked else self._do(pending.write, connection, transaction)
                    if outcome.must_be_retried(pending):
                        blocked.add(pending.job)
                    outcomes.append(outcome)
                connection.execute("COMMIT")
        except JournalError as error:
            roll_back(connection)
            return _Committed([_Outcome(error=error)] * len(writes), (), self._last_event)
        return _Committed(outcomes, transaction.events, transaction.last_event or self._last_event)

    def _do(self, write: Write[Any], connection: Connection, transaction: Transaction) -> _Outcome:
        """Do one write behind a savepoint. Raises JournalError if SQLite has rolled back the whole transaction."""
        try:
            with translate_errors(self.path), transaction.savepoint():
                return _Outcome(write(transaction))
        except JournalError as error:
            if not connection.in_transaction:
                raise
            return _Outcome(error=error)
        except Exception as error:  # a defect of the write or of its data, which only its caller should see
            logging.getLogger(__name__).exception("a write to %s failed", self.path)
            return _Outcome(error=error)

    def _keep_failed(self, writes: Sequence[_PendingWrite[Any]], outcomes: Sequence[_Outcome]) -> None:
        """Keep the failed writes of jobs for the next try."""
        if not self._failed:
            self._retry_at = time.monotonic() + RETRY_S
        pairs = zip(writes, outcomes, strict=True)
        self._failed += [pending for pending, outcome in pairs if outcome.must_be_retried(pending)]

    def _update_fault(self, outcomes: Sequence[_Outcome]) -> None:
        """Set `fault`, and log a fault once, when it begins."""
        errors = (outcome.error for outcome in outcomes)
        known = self.fault if self._failed else None
        fault = next((str(error) for error in errors if isinstance(error, JournalError)), known)
        if fault is not None and self.fault is None:
            logging.getLogger(__name__).error("%s", fault)
        self.fault = fault

    def _report(self, writes: Sequence[_PendingWrite[Any]], committed: _Committed) -> None:
        """Resolve the callers' futures and publish the events, on the event loop."""
        for pending, outcome in zip(writes, committed.outcomes, strict=True):
            if pending.done.done() or outcome.must_be_retried(pending):
                continue
            if outcome.error is None:
                pending.done.set_result(outcome.value)
            else:
                pending.done.set_exception(outcome.error)
        if committed.events:
            self._on_commit(committed.events)


def _mark_retrieved(future: "asyncio.Future[Any]") -> None:
    """Retrieve a future's exception, because asyncio would warn about a failed write that no caller waits for."""
    if not future.cancelled():
        future.exception()
