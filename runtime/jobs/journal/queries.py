"""Reads the journal: every function takes a connection and returns records. Nothing here writes."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from agents.role import explain
from runtime.jobs.job import JobState
from runtime.jobs.journal.database import Connection
from runtime.jobs.journal.records import JobEvent, JobRecord
from runtime.jobs.submission import Submission


def job(sql: Connection, id: str) -> JobRecord | None:
    """Return the job with an id, or None."""
    return next(iter(_select_jobs(sql, "id = ?", (id,))), None)


def job_of_key(sql: Connection, key: str) -> JobRecord | None:
    """Return the job with an idempotency key, or None."""
    return next(iter(_select_jobs(sql, "idempotency_key = ?", (key,))), None)


def jobs(
    sql: Connection, state: JobState | None = None, before: int | None = None, limit: int = 100
) -> list[JobRecord]:
    """Return a page of jobs, newest first: those in a state, if given, whose number is below `before`, if given."""
    where = "(?1 IS NULL OR state = ?1) AND (?2 IS NULL OR number < ?2)"
    return _select_jobs(sql, where, (state, before), f"number DESC LIMIT {int(limit)}")


def all_jobs(sql: Connection, state: JobState | None = None) -> Iterator[JobRecord]:
    """Yield every job, or every job in a state, oldest first. Reads 1,000 rows at a time."""
    after = 0
    while page := _select_jobs(sql, "(?1 IS NULL OR state = ?1) AND number > ?2", (state, after), "number LIMIT 1000"):
        yield from page
        after = page[-1].number


def jobs_by_id(sql: Connection, ids: Sequence[str]) -> dict[str, JobRecord]:
    """Return the existing jobs among some hundred ids, by id."""
    return {record.id: record for record in _select_jobs(sql, f"id IN ({', '.join('?' * len(ids))})", ids)}


def jobs_with_prefix(sql: Connection, prefix: str) -> list[JobRecord]:
    """Return at most two jobs whose ids start with a prefix, which is enough to tell whether it is unique."""
    return _select_jobs(sql, "substr(id, 1, ?1) = ?2", (len(prefix), prefix), "number LIMIT 2")


def unfinished(sql: Connection) -> list[JobRecord]:
    """Return the jobs that have not ended, in order of acceptance."""
    return _select_jobs(sql, "state IN (?, ?)", (JobState.QUEUED, JobState.RUNNING))


def counts(sql: Connection) -> dict[JobState, int]:
    """Return the number of jobs in each state."""
    by_state = dict(sql.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
    return {state: by_state.get(state, 0) for state in JobState}


def events(sql: Connection, after: int = 0, job: str | None = None, limit: int | None = 1000) -> list[JobEvent]:
    """Return the events after an id, in order, of one job or of all; at most `limit` of them, or all if it is None."""
    rows = sql.execute(
        "SELECT id, job, at, kind, data FROM events WHERE id > ?1 AND job = ?2 ORDER BY id LIMIT ?3"
        if job is not None
        else "SELECT id, job, at, kind, data FROM events WHERE id > ?1 AND ?2 IS NULL ORDER BY id LIMIT ?3",
        (after, job, -1 if limit is None else limit),  # to SQLite, a negative limit is none
    )
    return [JobEvent(id, of, at, kind, _value(data)) for id, of, at, kind, data in rows]


def last_event(sql: Connection) -> int:
    """Return the id of the latest event, or 0 if there is none."""
    (last,) = sql.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()
    return int(last)


def cursor(sql: Connection, name: str) -> int | None:
    """Return the id of the last event that a reader has handled, or None for a new reader."""
    row = sql.execute("SELECT event FROM cursors WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def _select_jobs(sql: Connection, where: str, arguments: Sequence[Any], order: str = "number") -> list[JobRecord]:
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
            submitted_at,
            started_at,
            ended_at,
            attempts,
            None if result is None else _value(result),
        )
        for number, id, state, submission, submitted_at, started_at, ended_at, attempts, result in rows
    ]


def _submission(id: str, text: str) -> Submission:
    """Parse a stored submission. Raises ValueError that names the job and the field."""
    try:
        return Submission.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"job {id}: {explain(error, 'the submission')}") from None


def _value(text: str) -> Any:
    """Parse stored JSON. Replace each half of a surrogate pair, because no reader could write it in UTF-8.

    Earlier versions of Troupe stored such halves if a model wrote them.
    """
    value = json.loads(text)
    if "\\ud" not in text:
        return value
    whole = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.loads(whole)
