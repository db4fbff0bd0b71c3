"""Owns every write to the journal. A job changes its state here and nowhere else, as `TRANSITIONS` allows."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from agents.tool_protocol import ToolUse
from runtime.jobs.job import TRANSITIONS, JobState
from runtime.jobs.journal import history, queries
from runtime.jobs.journal.database import Connection, connect, translate_errors
from runtime.jobs.journal.records import (
    INTERRUPTED,
    REPLIED,
    RESTARTED,
    TOOL_CALLED,
    TOOL_RETURNED,
    JobEvent,
    JobRecord,
    StartedJob,
)
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.submission import Submission
from runtime.jobs.tool_record import ToolRecord

T = TypeVar("T")

TITLE_MAX_CHARACTERS = 200
"""The most characters of a job's problem that its first event holds."""
DELETE_MAX_JOBS = 1000
"""The most jobs that one write deletes, so that other writes do not wait long."""
VACUUM_MAX_PAGES = 1000


class Transaction:
    """An open transaction. Its writes are durable once it is committed.

    `events` collects what to publish after the commit: the events that this transaction adds and, if it was made with
    the id of the last published event, those that other processes have added since then, in the order of their ids.
    """

    def __init__(self, connection: Connection, last_event: int | None = None) -> None:
        self._sql = connection
        self._last_event = last_event
        self.events: list[JobEvent] = []

    @property
    def last_event(self) -> int | None:
        """The id of the latest event that is in `events` or was published before."""
        return self._last_event

    def accept(self, id: str, submission: Submission) -> tuple[JobRecord, bool]:
        """Add a queued job, or find the one with the same idempotency key. Return it, and True if it is new."""
        now = time.time()
        inserted = self._sql.execute(
            "INSERT INTO jobs (id, idempotency_key, state, submission, submitted_at) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (idempotency_key) DO NOTHING",
            (id, submission.idempotency_key, JobState.QUEUED, submission.model_dump_json(), now),
        )
        if not inserted.rowcount:
            known = queries.job_of_key(self._sql, str(submission.idempotency_key))
            assert known is not None
            return known, False
        self._add_event(id, now, JobState.QUEUED, {"problem": submission.problem[:TITLE_MAX_CHARACTERS]})
        number = inserted.lastrowid or 0
        return JobRecord(number, id, JobState.QUEUED, submission, now, None, None, 0, None), True

    def move(self, id: str, state: JobState, result: dict[str, Any] | None = None, why: str = "") -> bool:
        """Move a job to a state, and store its result if there is one.

        Return False, and change nothing, if the job cannot enter the state from the one that it is in.
        """
        now = time.time()
        starts = state is JobState.RUNNING
        allowed = [before for before, after in TRANSITIONS.items() if state in after]
        moved = self._sql.execute(
            "UPDATE jobs SET state = ?, result = coalesce(?, result), started_at = coalesce(started_at, ?),"
            " attempts = attempts + ?, ended_at = ?"
            f" WHERE id = ? AND state IN ({', '.join('?' * len(allowed))})",
            (
                state,
                None if result is None else json.dumps(result),
                now if starts else None,
                starts,
                now if state.ended else None,
                id,
                *allowed,
            ),
        )
        if moved.rowcount:
            answer = {"answer": result["answer"]} if result is not None and state is JobState.DONE else {}
            self._add_event(id, now, state, {**answer, **({"why": why} if why else {})})
        return bool(moved.rowcount)

    def start(self, id: str) -> StartedJob | None:
        """Move a queued job to RUNNING and return what it resumes from. Return None if the job is not queued."""
        past = queries.events(self._sql, job=id, limit=None)
        if not self.move(id, JobState.RUNNING):
            return None
        record = queries.job(self._sql, id)
        assert record is not None
        return StartedJob(record, *history.resumed(past), history.worked_s(past))

    def requeue_interrupted(self) -> list[JobRecord]:
        """Queue the jobs again that another runtime left RUNNING. Return all jobs that have not ended."""
        for record in queries.unfinished(self._sql):
            if record.state is JobState.RUNNING:
                self.move(record.id, JobState.QUEUED, why=INTERRUPTED)
        return queries.unfinished(self._sql)

    def add_reply(self, id: str, reply: ReplyRecord, entries: list[dict[str, Any]]) -> None:
        """Record a reply, from which the job can resume, and the `entries` that it added to the transcript."""
        self._add_work(id, REPLIED, {**reply.as_json(), "entries": entries})

    def add_tool_call(self, id: str, call: ToolRecord) -> None:
        """Record that a tool is about to run."""
        self._add_work(id, TOOL_CALLED, call.as_json())

    def add_tool_use(self, id: str, number: int, seat: str, use: ToolUse) -> None:
        """Record the output of the last tool call that belongs to the job's call `number`."""
        data = {"number": number, "seat": seat, "tool": use.call.tool, "output": use.output, "failed": use.failed}
        self._add_work(id, TOOL_RETURNED, data)

    def restart(self, id: str) -> None:
        """Record that a job starts from its beginning: the replies that it has so far are not replayed."""
        self._add_work(id, RESTARTED, {})

    def catch_up(self) -> None:
        """Add the events that other processes have written to `events`."""
        if self._last_event is not None:
            self._collect(queries.events(self._sql, self._last_event, limit=None))

    def begin_cursor(self, name: str) -> None:
        """Add a cursor for a new reader at the latest event. Leave an existing cursor where it is."""
        self._sql.execute(
            "INSERT OR IGNORE INTO cursors (name, event) SELECT ?, coalesce(max(id), 0) FROM events", (name,)
        )

    def set_cursor(self, name: str, event: int) -> None:
        """Save the id of the last event that a reader has handled."""
        self._sql.execute("INSERT OR REPLACE INTO cursors (name, event) VALUES (?, ?)", (name, event))

    def delete_ended(self, ended_before: float, keep: int) -> int:
        """Delete jobs that ended before a time (seconds since 1970), and all but the latest `keep` that ended.

        Deletes at most DELETE_MAX_JOBS; returns how many. SQLite returns their pages to the file system bit by bit.
        """
        ids = [
            id
            for (id,) in self._sql.execute(
                "SELECT id FROM jobs WHERE ended_at < ? OR number IN"
                " (SELECT number FROM jobs WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT -1 OFFSET ?)"
                f" LIMIT {DELETE_MAX_JOBS}",
                (ended_before, keep),
            )
        ]
        self._sql.executemany("DELETE FROM events WHERE job = ?", ((id,) for id in ids))
        self._sql.executemany("DELETE FROM jobs WHERE id = ?", ((id,) for id in ids))
        self._sql.execute(f"PRAGMA incremental_vacuum({VACUUM_MAX_PAGES})").fetchall()
        return len(ids)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo the writes of the block if it raises; keep the rest of the transaction."""
        known_events, last_event = len(self.events), self._last_event
        self._sql.execute("SAVEPOINT write")
        try:
            yield
            self._sql.execute("RELEASE write")
        except BaseException:
            del self.events[known_events:]
            self._last_event = last_event
            if self._sql.in_transaction:  # after some errors SQLite has rolled everything back itself
                self._sql.execute("ROLLBACK TO write")
                self._sql.execute("RELEASE write")
            raise

    def _add_work(self, job: str, kind: str, data: dict[str, Any]) -> None:
        """Add an event of a job's work, unless the job has ended: its end is its last event."""
        if self._sql.execute("SELECT 1 FROM jobs WHERE id = ? AND ended_at IS NULL", (job,)).fetchone():
            self._add_event(job, time.time(), kind, data)

    def _add_event(self, job: str, at: float, kind: str, data: dict[str, Any]) -> None:
        inserted = self._sql.execute(
            "INSERT INTO events (job, at, kind, data) VALUES (?, ?, ?, ?)", (job, at, kind, json.dumps(data))
        )
        id = inserted.lastrowid or 0
        if self._last_event is not None and id > self._last_event + 1:
            self.catch_up()  # another process wrote the events in between, and readers must see those first
        else:
            self._collect([JobEvent(id, job, at, kind, data)])

    def _collect(self, events: list[JobEvent]) -> None:
        self.events += events
        if events and self._last_event is not None:
            self._last_event = events[-1].id


Write = Callable[[Transaction], T]
"""A function that writes within a transaction. What it returns reaches the caller once the transaction is committed."""


@contextmanager
def open_transaction(path: Path) -> Iterator[Transaction]:
    """Write to a journal from another process than the service, which notices it within half a second.

    Commits when the block ends, and writes nothing if it raises. Raises JournalError.
    """
    with closing(connect(path)) as connection, translate_errors(path):
        connection.execute("BEGIN IMMEDIATE")
        yield Transaction(connection)
        connection.execute("COMMIT")
