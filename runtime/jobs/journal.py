"""The journal: every accepted job, each reply that it got, and how it ended, in one SQLite file.

Owns durability: what a write has returned for is on the disk. One thread writes; what is asked of it meanwhile goes
into its next transaction (group commit), so that a thousand jobs a second cost a few dozen of the disk's syncs. Readers
never wait for it (WAL). States change here alone, and only as `TRANSITIONS` allows.
"""

import asyncio
import fcntl
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import ValidationError

from agents.role import explain
from runtime.errors import JournalError
from runtime.jobs.job import TRANSITIONS, JobState
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.submission import Submission

T = TypeVar("T")
Connection = sqlite3.Connection
"""To the file; what the functions at the end of this module ask."""

VERSION = 1
TOGETHER_MAX = 1000
"""Writes in a transaction at most."""
TITLE_MAX = 200
"""Characters of a problem in the event that says it was accepted."""
TAKEN_UP = "the runtime was started anew"
"""Why a job that another runtime left RUNNING is QUEUED again."""
_SCHEMA = f"""
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    idempotency_key TEXT UNIQUE,
    state TEXT NOT NULL,
    submission TEXT NOT NULL,
    submitted_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    result TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX events_by_job ON events (job, id);
CREATE TABLE cursors (name TEXT PRIMARY KEY, event INTEGER NOT NULL);
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class JobRecord:
    """A job as the journal has it. Times are seconds since 1970; `attempts` counts how often work on it began."""

    number: int
    id: str
    state: JobState
    submission: Submission
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    result: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """The form in which jobs are shown."""
        return {
            "id": self.id,
            "state": str(self.state),
            **self.submission.model_dump(mode="json"),
            "submitted_at": self.submitted_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "attempts": self.attempts,
            "result": self.result,
        }


@dataclass(frozen=True)
class JobEvent:
    """One line of what happened, in the order of `id`. `kind` is a state's name, or "replied", or "anew".

    `data` of a job that is new has the beginning of its `problem`, of one that is done its `answer`, of other ends
    `why`, and of a reply what ReplyRecord has, with the `entries` that it added to the transcript.
    """

    id: int
    job: str
    at: float
    kind: str
    data: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The form in which events are published."""
        return {"id": self.id, "job": self.job, "at": self.at, "kind": self.kind, **self.data}


@dataclass(frozen=True)
class Begun:
    """A job that work begins on: the replies that it resumes from, and the seconds that were worked on it before."""

    record: JobRecord
    past: Sequence[ReplyRecord] = ()
    worked_s: float = 0.0


@dataclass
class _Write(Generic[T]):
    """Something to be done in a transaction, and who waits for it."""

    do: "Do[T]"
    done: asyncio.Future[T]


@dataclass(frozen=True)
class _Answer:
    """What a write returned, or why it failed."""

    result: Any = None
    error: Exception | None = None


class Transaction:
    """What can be written. Every method's effect is durable when the write that it is part of has returned."""

    def __init__(self, connection: Connection, last_event: int | None = None) -> None:
        self._sql = connection
        self._last_event = last_event
        self.events: list[JobEvent] = []

    def accept(self, id: str, submission: Submission) -> tuple[JobRecord, bool]:
        """A new job that waits, or the one that was accepted under the same key; and whether it is new."""
        now = time.time()
        inserted = self._sql.execute(
            "INSERT INTO jobs (id, idempotency_key, state, submission, submitted_at) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (idempotency_key) DO NOTHING",
            (id, submission.idempotency_key, JobState.QUEUED, submission.model_dump_json(), now),
        )
        if not inserted.rowcount:
            known = job_of_key(self._sql, str(submission.idempotency_key))
            assert known is not None
            return known, False
        self._event(id, now, JobState.QUEUED, {"problem": submission.problem[:TITLE_MAX]})
        number = inserted.lastrowid or 0
        return JobRecord(number, id, JobState.QUEUED, submission, now, None, None, 0, None), True

    def move(self, id: str, state: JobState, result: dict[str, Any] | None = None, why: str = "") -> bool:
        """Bring a job into a state, with its result where it has one; False where it cannot come into it from the one
        that it is in, and nothing changes."""
        now = time.time()
        allowed = [before for before, after in TRANSITIONS.items() if state in after]
        moved = self._sql.execute(
            "UPDATE jobs SET state = ?, result = coalesce(?, result),"
            " started_at = CASE WHEN ? THEN coalesce(started_at, ?) ELSE started_at END,"
            " attempts = attempts + ?, ended_at = ?"
            f" WHERE id = ? AND state IN ({', '.join('?' * len(allowed))})",
            (
                state,
                None if result is None else json.dumps(result),
                state is JobState.RUNNING,
                now,
                state is JobState.RUNNING,
                now if state.ended else None,
                id,
                *allowed,
            ),
        )
        if moved.rowcount:
            answer = {"answer": result["answer"]} if result is not None and state is JobState.DONE else {}
            self._event(id, now, state, {**answer, **({"why": why} if why else {})})
        return bool(moved.rowcount)

    def begin(self, id: str) -> Begun | None:
        """Move a waiting job to RUNNING and return what it resumes from. Return None if it does not wait."""
        known = events(self._sql, job=id, limit=1_000_000)
        if not self.move(id, JobState.RUNNING):
            return None
        record = job(self._sql, id)
        assert record is not None
        return Begun(record, past(known), worked_s(known))

    def take_up(self) -> list[JobRecord]:
        """What another runtime has left: all that have not ended, to be begun again."""
        for record in unfinished(self._sql):
            if record.state is JobState.RUNNING:
                self.move(record.id, JobState.QUEUED, why=TAKEN_UP)
        return unfinished(self._sql)

    def catch_up(self) -> None:
        """Take note of what other processes have written since."""
        if self._last_event is not None:
            self._note(events(self._sql, self._last_event, limit=1_000_000))

    def replied(self, id: str, recorded: ReplyRecord, entries: list[dict[str, Any]]) -> None:
        """Keep a reply: what the job resumes from."""
        self._event(id, time.time(), "replied", {**recorded.as_json(), "entries": entries})

    def anew(self, id: str) -> None:
        """The replies that a job has had are not to be taken again."""
        self._event(id, time.time(), "anew", {})

    def begin_cursor(self, name: str) -> None:
        """Start a new reader's cursor at the latest event; an existing cursor stays."""
        self._sql.execute(
            "INSERT OR IGNORE INTO cursors (name, event) SELECT ?, coalesce(max(id), 0) FROM events", (name,)
        )

    def set_cursor(self, name: str, event: int) -> None:
        """Note how far a reader of the events has come."""
        self._sql.execute("INSERT OR REPLACE INTO cursors (name, event) VALUES (?, ?)", (name, event))

    def forget(self, ended_before: float, keep: int) -> int:
        """Delete the jobs that ended before a time, and the oldest of those beyond so many, some at a time; returns how
        many. Their pages go back to the file system with later writes."""
        gone = [
            id
            for (id,) in self._sql.execute(
                "SELECT id FROM jobs WHERE ended_at < ? OR number IN"
                " (SELECT number FROM jobs WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT -1 OFFSET ?)"
                " LIMIT 1000",
                (ended_before, keep),
            )
        ]
        self._sql.executemany("DELETE FROM events WHERE job = ?", ((id,) for id in gone))
        self._sql.executemany("DELETE FROM jobs WHERE id = ?", ((id,) for id in gone))
        self._sql.execute("PRAGMA incremental_vacuum(1000)").fetchall()
        return len(gone)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what is written inside if it raises, and keep the rest of the transaction."""
        known, last_event = len(self.events), self._last_event
        self._sql.execute("SAVEPOINT write")
        try:
            yield
            self._sql.execute("RELEASE write")
        except BaseException:
            del self.events[known:]
            self._last_event = last_event
            if self._sql.in_transaction:  # SQLite rolls everything back itself after some errors
                self._sql.execute("ROLLBACK TO write")
                self._sql.execute("RELEASE write")
            raise

    def _event(self, job: str, at: float, kind: str, data: dict[str, Any]) -> None:
        inserted = self._sql.execute(
            "INSERT INTO events (job, at, kind, data) VALUES (?, ?, ?, ?)", (job, at, kind, json.dumps(data))
        )
        number = inserted.lastrowid or 0
        if self._last_event is not None and number > self._last_event + 1:
            self.catch_up()  # another process has written: its events come first
        else:
            self._note([JobEvent(number, job, at, kind, data)])

    def _note(self, written: list[JobEvent]) -> None:
        self.events += written
        if written and self._last_event is not None:
            self._last_event = written[-1].id

    @property
    def last_event(self) -> int | None:
        """The latest event that is in `events`, or was before."""
        return self._last_event


Do = Callable[[Transaction], T]


class Journal:
    """An async context manager over the file. Only one process writes it as a service; entering raises JournalError
    when another does, when the file is damaged, or when it cannot be written.

    `committed` is told, on the event loop, what has happened and is on the disk.
    """

    def __init__(self, path: Path, committed: Callable[[Sequence[JobEvent]], None] = lambda events: None) -> None:
        self.path = path
        self.fault: str | None = None
        self._committed = committed
        self._writes: queue.SimpleQueue[_Write[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock: Any = None
        self._reader: Connection | None = None
        self._reading = threading.Lock()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        writer = await asyncio.to_thread(self._open)
        self._thread = threading.Thread(target=self._write_all, args=(writer,), name="journal", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Commit what is asked for, and let go of the file."""
        self._writes.put(None)
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)
        assert self._reader is not None
        self._reader.close()
        self._lock.close()

    def _open(self) -> Connection:
        with _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = self.path.with_name(f"{self.path.name}.lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise JournalError(f"{self.path} is in use by another `troupe serve`") from None
            try:
                writer = connect(self.path)
                self._reader = connect(self.path)
            except BaseException:
                self._lock.close()
                raise
            return writer

    async def write(self, do: Do[T]) -> T:
        """Do it in a transaction; return when that is on the disk. The write is done even if the caller is cancelled.

        Raises JournalError if the file cannot be written, and what `do` raises; then nothing of it is written.
        """
        return await asyncio.shield(self.post(do))

    def post(self, do: Do[T]) -> asyncio.Future[T]:
        """Ask for a write without waiting for it. Writes are done in the order in which they are posted."""
        write = _Write(do, self._loop.create_future())
        write.done.add_done_callback(_retrieved)
        self._writes.put(write)
        return write.done

    async def read(self, ask: Callable[[Connection], T]) -> T:
        """Ask the file in a thread. Raises JournalError."""

        def ask_now() -> T:
            assert self._reader is not None
            with self._reading, _told(self.path):
                return ask(self._reader)

        return await asyncio.to_thread(ask_now)

    def _write_all(self, connection: Connection) -> None:
        """The thread: transaction after transaction, until told to end."""
        with closing(connection):
            (last_event,) = connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()
            while True:
                first = self._writes.get()
                if first is None:
                    return
                writes = [first]
                with suppress(queue.Empty):
                    while len(writes) < TOGETHER_MAX:
                        more = self._writes.get_nowait()
                        if more is None:
                            self._writes.put(None)  # for the next turn: these come first
                            break
                        writes.append(more)
                last_event = self._commit(connection, writes, last_event)

    def _commit(self, connection: Connection, writes: list[_Write[Any]], last_event: int) -> int:
        """Do the writes in one transaction. A write that fails undoes itself alone; a failed COMMIT fails them all.

        Returns the id of the latest event that the loop is told of.
        """
        transaction = Transaction(connection, last_event)
        answers: list[_Answer] = []
        try:
            with _told(self.path):
                connection.execute("BEGIN IMMEDIATE")
                answers = [self._answer(connection, transaction, write) for write in writes]
                connection.execute("COMMIT")
        except JournalError as error:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            answers = [_Answer(error=error)] * len(writes)
            transaction = Transaction(connection, last_event)
        self._note_fault([answer.error for answer in answers])

        def tell() -> None:
            for write, answer in zip(writes, answers, strict=True):
                if write.done.done():
                    continue
                if answer.error is None:
                    write.done.set_result(answer.result)
                else:
                    write.done.set_exception(answer.error)
            if transaction.events:
                self._committed(transaction.events)

        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(tell)
        return transaction.last_event or last_event

    def _answer(self, connection: Connection, transaction: "Transaction", write: _Write[T]) -> "_Answer":
        """Do one write behind a savepoint. Raises JournalError if SQLite gave up the whole transaction."""
        try:
            with _told(self.path), transaction.savepoint():
                return _Answer(write.do(transaction))
        except JournalError as error:
            if not connection.in_transaction:
                raise
            return _Answer(error=error)
        except Exception as error:  # a defect of ours or of the data: it belongs to whoever asked for this write
            logging.getLogger(__name__).exception("a write to %s failed", self.path)
            return _Answer(error=error)

    def _note_fault(self, errors: Sequence[Exception | None]) -> None:
        """Keep the file's fault for `fault`, and log it once, when it begins."""
        fault = next((str(error) for error in errors if isinstance(error, JournalError)), None)
        if fault is not None and self.fault is None:
            logging.getLogger(__name__).error("%s", fault)
        self.fault = fault


def connect(path: Path) -> Connection:
    """A connection to a journal, made if there is none. Raises JournalError for a file that is none, is damaged, or is
    of a later version."""
    with _told(path):
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise JournalError(
                    f"{path} was written by a later Troupe (version {version}; this one knows {VERSION})"
                )
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict.splitlines()[-1])
            if version == 0:
                path.chmod(0o600)
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before there are tables; see `forget`
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # accepted is accepted, over a power cut too
            if version == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors as what a user can do about them."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        remedy = "; free some space" if "full" in text else ""
        raise JournalError(f"{path}: {text}{remedy}") from error
    except (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # a defect of whoever asked, not of the file
    except sqlite3.DatabaseError as error:
        raise JournalError(
            f"{path} is damaged ({error}). Nothing was changed. Move it aside, and save what it holds with"
            f" `sqlite3 {path.name} .recover | sqlite3 saved.db`"
        ) from error
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror or error}") from error


@contextmanager
def transaction(path: Path) -> Iterator[Transaction]:
    """Write to a journal from another process than the one that works its jobs. Raises JournalError."""
    with closing(connect(path)) as connection, _told(path):
        connection.execute("BEGIN IMMEDIATE")
        yield Transaction(connection)
        connection.execute("COMMIT")


def _retrieved(future: "asyncio.Future[Any]") -> None:
    """Those who do not wait are no reason for a warning."""
    if not future.cancelled():
        future.exception()


def _jobs(sql: Connection, where: str, arguments: Sequence[Any], order: str = "number") -> list[JobRecord]:
    rows = sql.execute(
        "SELECT number, id, state, submission, submitted_at, started_at, ended_at, attempts, result"
        f" FROM jobs WHERE {where} ORDER BY {order}",
        arguments,
    )
    return [
        JobRecord(
            number,
            id,
            JobState(state),
            _submission(id, submission),
            submitted,
            started,
            ended,
            attempts,
            None if result is None else json.loads(result),
        )
        for number, id, state, submission, submitted, started, ended, attempts, result in rows
    ]


def _submission(id: str, text: str) -> Submission:
    """Read what was submitted as a job. Raises ValueError naming the job and the field."""
    try:
        return Submission.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"job {id}: {explain(error)}") from None


def job(sql: Connection, id: str) -> JobRecord | None:
    """A job by its id."""
    return next(iter(_jobs(sql, "id = ?", (id,))), None)


def job_of_key(sql: Connection, key: str) -> JobRecord | None:
    """A job by its idempotency key."""
    return next(iter(_jobs(sql, "idempotency_key = ?", (key,))), None)


def jobs(
    sql: Connection, state: JobState | None = None, before: int | None = None, limit: int = 100
) -> list[JobRecord]:
    """Jobs in a state, or in any, the newest first; those below a number."""
    where = "(?1 IS NULL OR state = ?1) AND (?2 IS NULL OR number < ?2)"
    return _jobs(sql, where, (state, before), f"number DESC LIMIT {int(limit)}")


def all_jobs(sql: Connection, state: JobState | None = None) -> Iterator[JobRecord]:
    """Every job in a state, or in any, the oldest first, read some at a time."""
    after = 0
    while page := _jobs(sql, "(?1 IS NULL OR state = ?1) AND number > ?2", (state, after), "number LIMIT 1000"):
        yield from page
        after = page[-1].number


def jobs_by_id(sql: Connection, ids: Sequence[str]) -> dict[str, JobRecord]:
    """Those of these ids that there are, some hundreds at most."""
    return {record.id: record for record in _jobs(sql, f"id IN ({', '.join('?' * len(ids))})", ids)}


def jobs_like(sql: Connection, beginning: str) -> list[JobRecord]:
    """Two jobs at most whose ids begin so."""
    return _jobs(sql, "substr(id, 1, ?1) = ?2", (len(beginning), beginning), "number LIMIT 2")


def unfinished(sql: Connection) -> list[JobRecord]:
    """Those that have not ended, in the order in which they came."""
    return _jobs(sql, "state IN (?, ?)", (JobState.QUEUED, JobState.RUNNING))


def counts(sql: Connection) -> dict[JobState, int]:
    """How many jobs are in each state."""
    found = dict(sql.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
    return {state: found.get(state, 0) for state in JobState}


def events(sql: Connection, after: int = 0, job: str | None = None, limit: int = 1000) -> list[JobEvent]:
    """What happened after an event, to one job or to all, in order."""
    rows = sql.execute(
        "SELECT id, job, at, kind, data FROM events WHERE id > ?1 AND job = ?2 ORDER BY id LIMIT ?3"
        if job is not None
        else "SELECT id, job, at, kind, data FROM events WHERE id > ?1 AND ?2 IS NULL ORDER BY id LIMIT ?3",
        (after, job, limit),
    )
    return [JobEvent(id, of, at, kind, json.loads(data)) for id, of, at, kind, data in rows]


def past(events: Sequence[JobEvent]) -> list[ReplyRecord]:
    """The replies that a job resumes from, in the order in which they were taken, from all its events."""
    taken: list[ReplyRecord] = []
    for event in events:
        if event.kind == "anew":
            taken.clear()
        elif event.kind == "replied":
            taken.append(ReplyRecord.from_json(event.data))
    return taken


def worked_s(events: Sequence[JobEvent]) -> float:
    """Seconds that a job was worked on, from all its events.

    A run lasts until the event that ends it. A run that was interrupted by a stop or a crash of the runtime lasts until
    its last reply, because nobody knows how long it went on.
    """
    total, since, latest = 0.0, None, 0.0
    for event in events:
        if event.kind == JobState.RUNNING:
            since = event.at
        elif since is not None and event.kind == JobState.QUEUED:
            total += (latest if event.data.get("why") == TAKEN_UP else event.at) - since
            since = None
        latest = event.at
    return total


def last_event(sql: Connection) -> int:
    """The latest event's id, 0 where there is none."""
    (last,) = sql.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()
    return int(last)


def cursor(sql: Connection, name: str) -> int | None:
    """How far a reader of the events had come; None where it is new."""
    found = sql.execute("SELECT event FROM cursors WHERE name = ?", (name,)).fetchone()
    return None if found is None else int(found[0])
