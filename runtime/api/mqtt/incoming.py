"""Incoming MQTT messages: submissions of jobs, and commands."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from pydantic_core import to_json

from runtime.api import admin
from runtime.api.mqtt.connection import IN_FLIGHT_MAX, BrokerError, Connection, Message
from runtime.api.mqtt.in_order import InOrder
from runtime.api.mqtt.messages import (
    CancelCommand,
    ChangeCommand,
    Command,
    CommandAnswer,
    PinCommand,
    SubmissionAccepted,
    SubmissionRejected,
    Topics,
    UnpinCommand,
    correlation_of,
    read_command,
    read_submission,
)
from runtime.assembly import RunningTeam
from runtime.errors import Busy, JournalError, TroupeError
from runtime.jobs.journal.journal import RETRY_S
from runtime.jobs.journal.records import JobRecord
from runtime.jobs.service import JobService
from runtime.jobs.submission import Submission

MESSAGE_MAX_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class IncomingMessages:
    """The handler of submissions and commands, which answers each message and then acknowledges it.

    A message that the service cannot handle because it is stopping, or whose job the journal cannot take, is neither
    answered nor acknowledged. It stays with the broker, whose limit of messages in flight bounds how many there are.
    If the broker would not send the message to the next start, the service answers with the error instead.

    `running_team` returns the team whose engines are ready, and raises Busy if there is none. `broker_outlives_service`
    is False if the broker ends with this service.
    """

    def __init__(
        self,
        topics: Topics,
        jobs: JobService,
        running_team: Callable[[], RunningTeam],
        broker_outlives_service: bool = True,
    ) -> None:
        self._topics = topics
        self._jobs = jobs
        self._running_team = running_team
        self._broker_outlives_service = broker_outlives_service
        self._retries = asyncio.Lock()  # of submissions, first come, first served

    async def handle_all(self, connection: Connection) -> None:
        """Handle messages until cancelled. Raises BrokerError if the connection is lost.

        Up to `IN_FLIGHT_MAX` messages are handled at once, so that submissions that arrive together share a commit of
        the journal. A message is acknowledged after it is handled and answered; if this process or the connection ends
        earlier, the broker sends the message again.
        """
        slots = asyncio.Semaphore(IN_FLIGHT_MAX)
        acknowledgements = InOrder(connection.acknowledge)

        async def handle(message: Message) -> None:
            try:
                await self._handle(connection, message)
            finally:
                slots.release()

        async with asyncio.TaskGroup() as group:
            async for message in connection.messages:
                await slots.acquire()
                acknowledgements.add(message, group.create_task(handle(message), name="mqtt message"))

    async def _handle(self, connection: Connection, message: Message) -> None:
        try:
            if message.topic.matches(self._topics.submit):
                await self._submit(connection, message)
            else:
                await self._command(connection, message)
        except BrokerError:
            raise
        except Exception:  # our own bug: acknowledge the message, because it would fail again if it were sent again
            logger.exception("cannot handle a message on %s", message.topic)

    async def _submit(self, connection: Connection, message: Message) -> None:
        payload = bytes(message.payload)
        try:
            _check_size(payload)
            content = read_submission(payload)
            async with self._left_to_the_next_start(message):
                if self._is_sent_to_the_next_start(message):
                    record, new = await self._put_into_journal(content.submission)
                else:
                    record, new = await self._jobs.submit(content.submission)
        except Exception as error:  # noqa: BLE001  every error is answered, and _describe logs our own bugs
            rejected = SubmissionRejected(correlation_id=correlation_of(payload), error=_describe(error))
            await connection.publish(self._topics.rejected, to_json(rejected), qos=1)
            return
        accepted = SubmissionAccepted(id=record.id, correlation_id=content.correlation_id, state=record.state, new=new)
        await connection.publish(self._topics.accepted(record.id), to_json(accepted), qos=1)

    async def _put_into_journal(self, submission: Submission) -> tuple[JobRecord, bool]:
        """Submit a job, and try again while the journal cannot take it. Submissions that arrive meanwhile wait."""
        async with self._retries:
            pass  # release the lock at once, so that submissions share a commit
        with suppress(JournalError):
            return await self._jobs.submit(submission)
        async with self._retries:
            while True:
                with suppress(JournalError):
                    return await self._jobs.submit(submission)
                await asyncio.sleep(RETRY_S)

    def _is_sent_to_the_next_start(self, message: Message) -> bool:
        """Return True if the broker sends a message to the next start unless this service acknowledges it."""
        return self._broker_outlives_service and message.qos > 0

    @asynccontextmanager
    async def _left_to_the_next_start(self, message: Message) -> AsyncIterator[None]:
        """Wait until cancelled if the block raises Busy because the service is stopping.

        Raise the error if the broker does not send the message to the next start.
        """
        try:
            yield
        except Busy:
            if self._jobs.draining and self._is_sent_to_the_next_start(message):
                await asyncio.Event().wait()
            raise

    async def _command(self, connection: Connection, message: Message) -> None:
        payload = bytes(message.payload)
        error_text: str | None = None
        try:
            _check_size(payload)
            async with self._left_to_the_next_start(message):
                await self._execute(read_command(payload))
        except Exception as error:  # noqa: BLE001  as in _submit
            error_text = _describe(error)
        answer = CommandAnswer(correlation_id=correlation_of(payload), error=error_text)
        await connection.publish(self._topics.control_result, to_json(answer), qos=1)

    async def _execute(self, command: Command) -> None:
        match command:
            case ChangeCommand():
                command.apply(self._running_team())
            case PinCommand():
                command.apply(self._running_team(), command.engine)
            case UnpinCommand():
                admin.unpin(self._running_team(), command.engine)
            case CancelCommand():
                await self._jobs.cancel(command.job)


def _check_size(payload: bytes) -> None:
    if len(payload) > MESSAGE_MAX_BYTES:
        raise TroupeError(f"the message has {len(payload)} bytes; send at most {MESSAGE_MAX_BYTES}")


def _describe(error: Exception) -> str:
    """Return the text of an error for the sender of a message. Log the error if it is our own bug."""
    if isinstance(error, TroupeError):
        return str(error)
    logger.error("internal error while handling a message", exc_info=error)
    return f"internal error: {error!r}"
