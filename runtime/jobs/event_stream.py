"""What happens to jobs, for any number of readers, each at its own pace.

Nothing is kept for a reader: it has a place in the journal, and the latest events are in memory for all. So a reader
that is slow, or gone, costs nothing, and one that comes back goes on from where it was.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import takewhile

from runtime.jobs import journal as store
from runtime.jobs.job import JobState
from runtime.jobs.journal import Connection, JobEvent, Journal

RECENT = 10_000
"""Events in memory."""
ENDS = frozenset(str(state) for state in JobState if state.ended)


class EventStream:
    """Readers of a journal's events. `publish` is called in their order, with each once."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._recent: deque[JobEvent] = deque(maxlen=RECENT)
        self._news = asyncio.Event()
        self._of_jobs: dict[str, set[asyncio.Event]] = {}

    def publish(self, events: Sequence[JobEvent]) -> None:
        """These are on the disk: wake those who wait for them."""
        self._recent.extend(events)
        news, self._news = self._news, asyncio.Event()
        news.set()
        for event in events:
            for reader in self._of_jobs.get(event.job, ()):
                reader.set()

    async def follow(self, after: int) -> AsyncGenerator[JobEvent, None]:
        """All events after one, and on as they come; never ends."""
        async with aclosing(self.batches(after)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self, after: int) -> AsyncGenerator[list[JobEvent], None]:
        """As `follow`, those together that are there together."""
        while True:
            news = self._news
            batch = self._since(after)
            if batch is None:
                batch = await self._journal.read(partial(store.events, after=after))
            if batch:
                after = batch[-1].id
                yield batch
            else:
                await news.wait()

    async def follow_job(self, job: str, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """A job's events after one, and on as they come, until it has ended."""
        news = asyncio.Event()
        self._of_jobs.setdefault(job, set()).add(news)
        try:
            while True:
                news.clear()
                ended, batch = await self._journal.read(partial(_of_job, job=job, after=after))
                for event in batch:
                    after = event.id
                    yield event
                    if event.kind in ENDS:
                        return
                if ended and not batch:
                    return  # before what was asked for; or it was forgotten
                if not batch:
                    await news.wait()
        finally:
            readers = self._of_jobs[job]
            readers.discard(news)
            if not readers:
                del self._of_jobs[job]

    def latest(self) -> int | None:
        """The id of the latest event, None where none has come yet."""
        return self._recent[-1].id if self._recent else None

    def _since(self, after: int) -> list[JobEvent] | None:
        """The events after one as far as they are in memory; None where some are not."""
        if not self._recent or self._recent[0].id > after + 1:
            return None
        new = list(takewhile(lambda event: event.id > after, reversed(self._recent)))
        return new[::-1]


def _of_job(sql: Connection, job: str, after: int) -> tuple[bool, list[JobEvent]]:
    """Whether the job has ended, and its events after one: asked in this order, they hold its end if it has."""
    record = store.job(sql, job)
    return record is None or record.state.ended, store.events(sql, after, job)
