"""Owns the stream of job events, which any number of readers follow at their own pace.

It keeps the latest events in memory once for all readers, and nothing for a single one. A reader that falls behind, or
comes back, reads the rest from the journal, starting after the last event that it has seen.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import takewhile

from runtime.jobs.job import JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.database import Connection
from runtime.jobs.journal.journal import Journal
from runtime.jobs.journal.records import JobEvent

RECENT_MAX_EVENTS = 10_000
ENDS = frozenset(str(state) for state in JobState if state.ended)
"""The kinds of event that end a job."""


class EventStream:
    """The events of a journal, for many readers. `publish` must be called once for each event, in order."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._recent: deque[JobEvent] = deque(maxlen=RECENT_MAX_EVENTS)
        self._news = asyncio.Event()
        self._job_readers: dict[str, set[asyncio.Event]] = {}

    def publish(self, events: Sequence[JobEvent]) -> None:
        """Add events that are on the disk, and wake the readers that wait for them."""
        self._recent.extend(events)
        news, self._news = self._news, asyncio.Event()
        news.set()
        for event in events:
            for reader in self._job_readers.get(event.job, ()):
                reader.set()

    async def follow(self, after: int) -> AsyncGenerator[JobEvent, None]:
        """Yield all events after an id, then new ones as they come. Never ends."""
        async with aclosing(self.batches(after)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self, after: int) -> AsyncGenerator[list[JobEvent], None]:
        """Yield what `follow` yields, as lists of the events that are available together."""
        while True:
            news = self._news
            batch = self._recent_after(after)
            if batch is None:
                batch = await self._journal.read(partial(queries.events, after=after))
            if batch:
                after = batch[-1].id
                yield batch
            else:
                await news.wait()

    async def follow_job(self, job: str, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's events after an id, then new ones as they come, until the job has ended."""
        news = asyncio.Event()
        self._job_readers.setdefault(job, set()).add(news)
        try:
            while True:
                news.clear()
                ended, batch = await self._journal.read(partial(_job_events, job=job, after=after))
                for event in batch:
                    after = event.id
                    yield event
                    if event.kind in ENDS:
                        return
                if ended and not batch:  # it ended at or before `after`, or was deleted
                    return
                if not batch:
                    await news.wait()
        finally:
            readers = self._job_readers[job]
            readers.discard(news)
            if not readers:
                del self._job_readers[job]

    def latest(self) -> int | None:
        """Return the id of the latest event since this stream was made, or None."""
        return self._recent[-1].id if self._recent else None

    def _recent_after(self, after: int) -> list[JobEvent] | None:
        """Return the events after an id from memory, or None if some of them are no longer there."""
        if not self._recent or self._recent[0].id > after + 1:
            return None
        newest_first = takewhile(lambda event: event.id > after, reversed(self._recent))
        return list(newest_first)[::-1]


def _job_events(sql: Connection, job: str, after: int) -> tuple[bool, list[JobEvent]]:
    """Return whether a job has ended, and its events after an id.

    The state is read first, so that the events of a job that has ended include its end.
    """
    record = queries.job(sql, job)
    return record is None or record.state.ended, queries.events(sql, after, job)
