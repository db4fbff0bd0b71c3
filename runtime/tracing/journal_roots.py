"""Ends the traces of the service's jobs when the journal says that they have ended.

A job of the service waits in a queue, may be tried again, and survives the process. Only the journal knows when it was
accepted and how it ended. Each job has one end in the journal, so its root span is exported once. An end whose spans
were not exported before a crash has no root span.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial

from runtime.errors import JournalError
from runtime.jobs.event_stream import ENDS
from runtime.jobs.job import JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.database import Connection
from runtime.jobs.journal.records import RESTARTED, JobEvent, JobRecord
from runtime.jobs.service import JobService
from runtime.tracing.job_spans import NS, EndedJob, JobSpans

RETRY_S = 1.0
"""Seconds before the next try after the journal could not be read."""
_MOMENTS = (JobState.QUEUED, JobState.RUNNING, RESTARTED)


@asynccontextmanager
async def following(spans: JobSpans, jobs: JobService) -> AsyncIterator[None]:
    """Export the root spans of the jobs that end from now on. Leaving exports those of all that have ended by then."""
    roots = _JournalRoots(jobs, spans, await jobs.journal.read(queries.last_event))
    task = asyncio.create_task(roots.follow(), name="trace roots")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await roots.finish()


class _JournalRoots:
    """A reader of the journal's events. `after` is the id of the last event that it has handled."""

    def __init__(self, jobs: JobService, spans: JobSpans, after: int) -> None:
        self._jobs = jobs
        self._spans = spans
        self._after = after

    async def follow(self) -> None:
        """Handle events until cancelled."""
        while True:
            try:
                async with aclosing(self._jobs.events.batches(self._after)) as batches:
                    async for batch in batches:
                        await self._handle(batch)
            except JournalError as error:
                logging.getLogger(__name__).warning("traces: %s", error)
                await asyncio.sleep(RETRY_S)

    async def finish(self) -> None:
        """Handle the events that are in the journal now."""
        try:
            while batch := await self._jobs.journal.read(partial(queries.events, after=self._after)):
                await self._handle(batch)
        except JournalError as error:
            logging.getLogger(__name__).warning("traces: %s", error)

    async def _handle(self, batch: Sequence[JobEvent]) -> None:
        """Export the roots of the jobs that end in a batch. A cancellation exports either all of them or none."""
        ids = [event.job for event in batch if event.kind in ENDS]
        ended = await self._jobs.journal.read(partial(_ended, ids=ids)) if ids else []
        for job in ended:
            self._spans.end(job)
        self._after = batch[-1].id


def _ended(sql: Connection, ids: Sequence[str]) -> list[EndedJob]:
    """Return the jobs with these ids that are still in the journal."""
    records = queries.jobs_by_id(sql, ids).values()
    return [
        _ended_job(record, queries.events(sql, job=record.id, limit=None) if record.attempts > 1 else ())
        for record in records
    ]


def _ended_job(record: JobRecord, events: Sequence[JobEvent]) -> EndedJob:
    """Return what the root span shows. `events` holds all events of a job that ran more than once."""
    moments = [
        (int(event.at * NS), f"troupe.job.{_word(event.kind)}", str(event.data.get("why", "")))
        for event in events
        if event.kind in _MOMENTS
    ]
    if not events and record.started_at is not None:
        moments = [(int(record.started_at * NS), "troupe.job.running", "")]
    result = record.result or {}
    usage = result.get("usage", {}).values()
    done = record.state is JobState.DONE
    return EndedJob(
        id=record.id,
        state=str(record.state),
        error=None if done else str(result.get("error", record.state)),
        start_ns=int(record.submitted_at * NS),
        end_ns=int((record.ended_at or record.submitted_at) * NS),
        input_tokens=sum(used["prompt_tokens"] for used in usage),
        output_tokens=sum(used["completion_tokens"] for used in usage),
        attempts=record.attempts,
        confirmed=result.get("confirmed"),
        moments=moments,
    )


def _word(kind: str) -> str:
    return "restarted" if kind == RESTARTED else kind
