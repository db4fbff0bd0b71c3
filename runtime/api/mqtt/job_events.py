"""Outgoing job events and results, read from the journal after a cursor.

The cursor is the last event that the broker is known to have received. A broker or a service that is away therefore
loses no event and no result, and no unsent message is kept in memory. The broker may receive an event or a result
twice; receivers tell by its id.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial

from pydantic_core import PydanticSerializationError, to_json

from runtime.api.mqtt.connection import IN_FLIGHT_MAX, Connection, raise_if_cancelled
from runtime.api.mqtt.in_order import InOrder
from runtime.api.mqtt.messages import Topics
from runtime.errors import JournalError
from runtime.jobs.event_stream import ENDS
from runtime.jobs.journal import queries
from runtime.jobs.journal.journal import Journal
from runtime.jobs.journal.records import JobEvent, JobRecord
from runtime.jobs.journal.transaction import Transaction
from runtime.jobs.service import JobService

CURSOR = "mqtt"
CURSOR_SAVE_S = 0.5
"""Seconds between writes of the cursor. After a crash, everything sent since the last write is sent again."""


async def begin_cursor(journal: Journal) -> None:
    """Start the MQTT cursor of a new journal at its latest event. An existing cursor stays as it is.

    Call it before the service accepts jobs: their events are then sent, however late the broker is first reached.
    Raises JournalError.
    """
    await journal.write(partial(Transaction.begin_cursor, name=CURSOR))


class JobEvents:
    """The publisher of job events and results. It keeps its cursor across connections."""

    def __init__(self, topics: Topics, jobs: JobService) -> None:
        self._topics = topics
        self._jobs = jobs
        self._cursor: int | None = None

    async def publish_all(self, connection: Connection) -> None:
        """Publish every event after the cursor in order, and each job's result after its last event, until cancelled.

        Events are sent at QoS 0, results at QoS 1. MQTT delivers over one connection in order, so the acknowledgement
        of a result confirms all events before it. After a lost connection, everything after the last acknowledged
        result is sent again.

        Raises BrokerError if the connection is lost, and JournalError.
        """
        cursor = self._cursor if self._cursor is not None else await self._load_cursor()
        results = InOrder(self._move_cursor)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._save_cursor(), name="mqtt cursor")
            async with aclosing(self._jobs.events.batches(cursor)) as batches:
                async for batch in batches:
                    await self._publish_batch(connection, batch, results, group)
                    await results.wait_for_room(IN_FLIGHT_MAX)

    async def _publish_batch(
        self, connection: Connection, batch: Sequence[JobEvent], results: InOrder[int], group: asyncio.TaskGroup
    ) -> None:
        """Publish events and results. Start one task in the group for each result, and add it to `results`."""
        ended = await self._ended_jobs(batch)
        for event in batch:
            if (payload := _encoded(event)) is not None:
                await connection.publish(self._topics.events(event.job), payload, qos=0)
            raise_if_cancelled()
            if event.kind in ENDS and event.job in ended and (result := _encoded(ended[event.job])) is not None:
                publishing = connection.publish(self._topics.result(event.job), result, qos=1)
                results.add(event.id, group.create_task(publishing, name="mqtt result"))

    async def _ended_jobs(self, batch: Sequence[JobEvent]) -> Mapping[str, JobRecord]:
        """Return the jobs whose last event is in the batch, by id; jobs deleted since are missing."""
        ids = [event.job for event in batch if event.kind in ENDS]
        records: dict[str, JobRecord] = {}
        for start in range(0, len(ids), IN_FLIGHT_MAX):
            some = ids[start : start + IN_FLIGHT_MAX]
            records |= await self._jobs.journal.read(partial(queries.jobs_by_id, ids=some))
        return records

    def _move_cursor(self, event: int) -> None:
        self._cursor = event

    async def _load_cursor(self) -> int:
        self._cursor = await self._jobs.journal.read(partial(queries.cursor, name=CURSOR))
        assert self._cursor is not None, "begin_cursor was not called"
        return self._cursor

    async def _save_cursor(self) -> None:
        """Write the cursor to the journal whenever it has moved."""
        saved = None
        while True:
            if (cursor := self._cursor) is not None and cursor != saved:
                with suppress(JournalError):  # the journal logs the error; the next turn tries again
                    await self._jobs.journal.write(partial(Transaction.set_cursor, name=CURSOR, event=cursor))
                    saved = cursor
            await asyncio.sleep(CURSOR_SAVE_S)


def _encoded(record: JobEvent | JobRecord) -> bytes | None:
    """Return an event or a job as JSON. If JSON cannot hold it, log that and return None, so that others follow."""
    try:
        return to_json(record.as_json())
    except PydanticSerializationError as error:
        kind = "an event" if isinstance(record, JobEvent) else "the result"
        job = record.job if isinstance(record, JobEvent) else record.id
        logging.getLogger(__name__).error("%s of job %s is not published: %s", kind, job, error)
        return None
