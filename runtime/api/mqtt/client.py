"""The service on a broker: takes submissions and commands, and publishes what happens.

Job events and results come from the journal, from the last one that the broker has acknowledged on; so a broker, or a
service, that is away for a while costs none of them, and nothing is kept in memory for it. Of states and decisions
only the latest is sent. The broker may get an event or a result twice; their ids tell.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiomqtt
from pydantic_core import to_json

from runtime.api import admin
from runtime.api.monitor import Monitor
from runtime.api.mqtt.in_order import InOrder
from runtime.api.mqtt.messages import (
    Accepted,
    CancelCommand,
    ChangeCommand,
    Command,
    GrantState,
    Liveness,
    Obeyed,
    PinCommand,
    Refused,
    RoleState,
    Topics,
    UnpinCommand,
    correlation_of,
    read_command,
    read_submission,
)
from runtime.assembly import RunningTeam
from runtime.config import Mqtt
from runtime.errors import ConfigError, JournalError, NotFound, TroupeError
from runtime.jobs.event_stream import ENDS
from runtime.jobs.journal import queries
from runtime.jobs.journal.journal import Journal
from runtime.jobs.journal.records import JobEvent, JobRecord
from runtime.jobs.journal.transaction import Transaction
from runtime.jobs.service import JobService
from runtime.jobs.team import Team

AT_ONCE = 500
"""Messages under way, to the broker or being taken in, at most."""
CURSOR = "mqtt"
SAVE_S = 0.5
"""So often the place in the journal is noted; after a crash what was sent since is sent again."""
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
PUBLISH_S = 10.0
MESSAGE_MAX_BYTES = 1 << 20


async def begin_cursor(journal: Journal) -> None:
    """Note where MQTT begins in a journal that is new to it: events from now on are sent, however late the broker is
    first reached. To be called before anything is accepted. Raises JournalError."""
    await journal.write(partial(Transaction.begin_cursor, name=CURSOR))


class MqttClient:
    """The MQTT side of a service. Runs until it is cancelled, with a broker or without.

    `running_team` returns the team whose engines are ready, and raises Busy while there is none. `tell` is called with
    a text whenever the connection changes.
    """

    def __init__(
        self,
        config: Mqtt,
        team: Team,
        jobs: JobService,
        status: Monitor,
        running_team: Callable[[], RunningTeam],
        tell: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._config = config
        self._topics = Topics(config.cluster)
        self._team = team
        self._jobs = jobs
        self._status = status
        self._running_team = running_team
        self._password = _password(config)
        self._tls = _tls(config)
        self._sent: int | None = None
        self._tell = tell
        self._told = ""

    async def run(self) -> None:
        """Connect, again and again."""
        tries = 0
        while True:
            try:
                async with self._client() as client:
                    tries = 0
                    await self._serve(client)
            except* (aiomqtt.MqttError, TroupeError) as errors:
                self._note(f"{_first(errors)}; trying again")
            except* Exception as errors:  # of ours, or of the client's: told, and the next connection begins anew
                logging.getLogger(__name__).exception("mqtt")
                self._note(f"an internal error: {_first(errors)!r}; trying again")
            await asyncio.sleep(BACKOFF_S[min(tries, len(BACKOFF_S) - 1)])
            tries += 1

    def _note(self, what: str) -> None:
        if what != self._told:
            self._told = what
            text = f"the broker at {self._config.host}:{self._config.port}: {what}"
            logging.getLogger(__name__).info("%s", text)
            self._tell(text)

    def _client(self) -> aiomqtt.Client:
        config = self._config
        client = aiomqtt.Client(
            config.host,
            config.port,
            identifier=f"troupe-{config.cluster}",
            clean_session=False,  # what is submitted while the service is away waits at the broker
            username=config.username,
            password=self._password,
            tls_context=self._tls,
            will=aiomqtt.Will(self._topics.state, to_json(Liveness(state="gone")), qos=1, retain=True),
            keepalive=10,
            timeout=PUBLISH_S,
            max_inflight_messages=AT_ONCE,
            max_queued_outgoing_messages=0,
            socket_options=[(6, 1, 1)],  # IPPROTO_TCP, TCP_NODELAY: an acknowledgement does not wait for company
        )
        client._client.manual_ack_set(True)  # see _take_in
        client.pending_calls_threshold = 4 * AT_ONCE
        return client

    async def _serve(self, client: aiomqtt.Client) -> None:
        topics = self._topics
        await client.subscribe([(topics.submit, 1), (topics.control, 1)])
        await client.publish(topics.state, to_json(Liveness(state="up")), qos=1, retain=True)
        self._note("connected")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._take_in(client), name="mqtt in")
                group.create_task(self._send_jobs(client), name="mqtt jobs")
                group.create_task(self._send_states(client), name="mqtt states")
        finally:
            with suppress(aiomqtt.MqttError, TimeoutError):
                async with asyncio.timeout(1):
                    await client.publish(topics.state, to_json(Liveness(state="ended")), qos=1, retain=True)

    async def _take_in(self, client: aiomqtt.Client) -> None:
        """Take submissions and commands, many at a time, so that those that come together share a commit.

        A message is acknowledged once it was handled and answered: the broker sends it again if this process, or the
        connection, ends before. MQTT 3.1.1 asks for acknowledgements in the order of the messages (4.6).
        """
        room = asyncio.Semaphore(AT_ONCE)

        def acknowledge(message: aiomqtt.Message) -> None:
            client._client.ack(message.mid, message.qos)  # paho's own; aiomqtt does not pass it on

        async def handle(message: aiomqtt.Message) -> None:
            try:
                payload = bytes(message.payload)
                if message.topic.matches(self._topics.submit):
                    await self._submit(client, payload)
                else:
                    await self._command(client, payload)
            except aiomqtt.MqttError:
                raise
            except Exception:  # a defect of ours: sent again, this message would fail again
                logging.getLogger(__name__).exception("a message on %s", message.topic)
            finally:
                room.release()

        handled = InOrder(acknowledge)
        async with asyncio.TaskGroup() as group:
            async for message in client.messages:
                await room.acquire()
                handled.add(message, group.create_task(handle(message), name="mqtt message"))

    async def _submit(self, client: aiomqtt.Client, payload: bytes) -> None:
        try:
            _check_size(payload)
            message = read_submission(payload)
            record, new = await self._jobs.submit(message.submission)
        except Exception as error:  # noqa: BLE001  the sender is told, and a defect is logged
            refused = Refused(correlation_id=correlation_of(payload), error=_reason(error))
            await client.publish(self._topics.rejected, to_json(refused), qos=1)
            return
        accepted = Accepted(id=record.id, correlation_id=message.correlation_id, state=record.state, new=new)
        await client.publish(self._topics.accepted(record.id), to_json(accepted), qos=1)

    async def _command(self, client: aiomqtt.Client, payload: bytes) -> None:
        wrong: str | None = None
        try:
            _check_size(payload)
            await self._obey(read_command(payload))
        except Exception as error:  # noqa: BLE001  as above
            wrong = _reason(error)
        answer = Obeyed(correlation_id=correlation_of(payload), error=wrong)
        await client.publish(self._topics.control_result, to_json(answer), qos=1)

    async def _obey(self, command: Command) -> None:
        match command:
            case ChangeCommand():
                command.apply(self._running_team())
            case PinCommand():
                command.apply(self._running_team(), command.engine)
            case UnpinCommand():
                admin.unpin(self._running_team(), command.engine)
            case CancelCommand():
                if await self._jobs.cancel(command.job) is None:
                    raise NotFound(f"there is no job {command.job[:100]!r}")

    async def _send_jobs(self, client: aiomqtt.Client) -> None:
        """Every event from where the broker's acknowledgements end, in order, and each result once its job has ended.

        Events need no acknowledgement of their own (QoS 0): a result's, which comes after them over the same
        connection, says that they have come, too. After a break all since the last result is sent again.
        """
        if self._sent is None:
            self._sent = await self._jobs.journal.read(partial(queries.cursor, name=CURSOR))
            assert self._sent is not None, "begin_cursor was not called"

        def acknowledged(event: int) -> None:
            self._sent = event

        async with asyncio.TaskGroup() as group:
            group.create_task(self._save_cursor(), name="mqtt cursor")
            results_sent = InOrder(acknowledged)
            async with aclosing(self._jobs.feed.batches(self._sent)) as batches:
                async for batch in batches:
                    results = await self._results(batch)
                    for event in batch:
                        await client.publish(self._topics.events(event.job), to_json(event.as_json()), qos=0)
                        _check_cancelled()
                        if event.kind in ENDS and event.job in results:
                            payload = to_json(results[event.job].as_json())
                            sending = client.publish(self._topics.result(event.job), payload, qos=1)
                            results_sent.add(event.id, group.create_task(sending, name="mqtt result"))
                    await results_sent.room(AT_ONCE)

    async def _results(self, batch: Sequence[JobEvent]) -> Mapping[str, JobRecord]:
        """The jobs that have ended in a batch of events."""
        ended = [event.job for event in batch if event.kind in ENDS]
        found: dict[str, JobRecord] = {}
        for start in range(0, len(ended), AT_ONCE):
            some = ended[start : start + AT_ONCE]
            found |= await self._jobs.journal.read(partial(queries.jobs_by_id, ids=some))
        return found

    async def _save_cursor(self) -> None:
        saved = None
        while True:
            if (sent := self._sent) is not None and sent != saved:
                with suppress(JournalError):  # the journal has logged it; the next turn tries again
                    await self._jobs.journal.write(partial(Transaction.set_cursor, name=CURSOR, event=sent))
                    saved = sent
            await asyncio.sleep(SAVE_S)

    async def _send_states(self, client: aiomqtt.Client) -> None:
        """The latest of everything that changed since it was sent last."""
        known: dict[str, bytes] = {}
        while True:
            for topic, state in self._states().items():
                payload = to_json(state)
                if known.get(topic) != payload:
                    known[topic] = payload
                    await client.publish(topic, payload, qos=0, retain=True)
                    _check_cancelled()
            await self._status.news()

    def _states(self) -> dict[str, Any]:
        status, topics = self._status, self._topics
        sample = status.samples[-1] if status.samples else None
        engines = sample.engines if sample else {}
        states: dict[str, Any] = {
            topics.role(seat.name): RoleState(
                engine=seat.engine, state=status.states.get(seat.engine), now=engines.get(seat.engine)
            )
            for seat in self._team.seats.values()
        }
        for name, now in engines.items():
            states[topics.grant(name)] = GrantState(
                gpu_memory_utilization=now.share,
                kv_cache_bytes=now.kv_cache_bytes,
                max_active_seqs=now.max_active_seqs,
            )
        if sample:
            states[topics.device(0)] = sample.device
        if status.decisions:
            states[topics.decision] = status.decisions[-1]
        return states


def _first(errors: BaseException) -> BaseException:
    """What went wrong first, out of groups within groups."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


def _reason(error: Exception) -> str:
    """Return what to tell the sender of a message about an error. Log a defect of ours."""
    if isinstance(error, TroupeError):
        return str(error)
    logging.getLogger(__name__).error("a message", exc_info=error)
    return f"an internal error: {error!r}"


def _check_cancelled() -> None:
    """Raise CancelledError where this task was cancelled: on Python 3.11 the client's wait_for may swallow it, and who
    publishes in a loop would never end. For tasks whose task groups are not entered again: one that a child's failure
    has broken off leaves its task marked."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _check_size(payload: bytes) -> None:
    if len(payload) > MESSAGE_MAX_BYTES:
        raise TroupeError(f"the message is too large: at most {MESSAGE_MAX_BYTES} bytes are taken")


def _password(config: Mqtt) -> str | None:
    if config.password_file is None:
        return None
    try:
        lines = Path(config.password_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"mqtt.password_file: {config.password_file}: {error}") from None
    if not lines or not lines[0]:
        raise ConfigError(
            f"mqtt.password_file: {config.password_file}: its first line is empty; put the password there"
        )
    return lines[0]


def _tls(config: Mqtt) -> ssl.SSLContext | None:
    if not config.tls and config.ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=config.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"mqtt.ca_file: {config.ca_file}: {error}") from None
