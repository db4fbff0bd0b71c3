"""The service's MQTT client: keeps one connection to the broker and runs everything that uses it."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from pydantic_core import to_json

from runtime.api.monitor import Monitor
from runtime.api.mqtt.connection import Broker, BrokerError, Connection
from runtime.api.mqtt.incoming import IncomingMessages
from runtime.api.mqtt.job_events import JobEvents
from runtime.api.mqtt.messages import Liveness, Topics
from runtime.api.mqtt.states import States
from runtime.assembly import RunningTeam
from runtime.config import Mqtt
from runtime.errors import TroupeError
from runtime.jobs.service import JobService
from runtime.jobs.team import Team

RETRY_DELAYS_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Waits before the first, second, ... new connection; the last one repeats."""

logger = logging.getLogger(__name__)


class MqttClient:
    """The MQTT side of a service, which works whether or not the broker can be reached.

    `running_team` returns the team whose engines are ready, and raises Busy if there is none. `tell` is called with a
    text for the user whenever the state of the connection changes. `broker_outlives_service` is False for the embedded
    broker. Raises ConfigError if the password or CA file cannot be read.
    """

    def __init__(
        self,
        config: Mqtt,
        team: Team,
        jobs: JobService,
        monitor: Monitor,
        running_team: Callable[[], RunningTeam],
        tell: Callable[[str], None] = lambda text: None,
        broker_outlives_service: bool = True,
    ) -> None:
        self._broker = Broker(config)
        self._topics = Topics(config.cluster)
        self._incoming = IncomingMessages(self._topics, jobs, running_team, broker_outlives_service)
        self._job_events = JobEvents(self._topics, jobs)
        self._states = States(self._topics, team, monitor)
        self._tell = tell
        self._last_report = ""

    async def run(self) -> None:
        """Connect to the broker, and connect again after every failure, until cancelled."""
        failures = 0
        while True:
            try:
                async with self._broker.connect(self._topics.state, _liveness("gone")) as connection:
                    failures = 0
                    await self._serve(connection)
            except* (BrokerError, TroupeError) as errors:
                self._report(f"{_first_error(errors)}; trying again")
            except* Exception as errors:  # a bug of ours or of aiomqtt: log it, and start over with a new connection
                logger.exception("internal error in the MQTT client")
                self._report(f"internal error: {_first_error(errors)!r}; trying again")
            await asyncio.sleep(RETRY_DELAYS_S[min(failures, len(RETRY_DELAYS_S) - 1)])
            failures += 1

    async def _serve(self, connection: Connection) -> None:
        await connection.subscribe(self._topics.submit, self._topics.control)
        await self._publish_liveness(connection, "up")
        self._report("connected")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._incoming.handle_all(connection), name="mqtt in")
                group.create_task(self._job_events.publish_all(connection), name="mqtt jobs")
                group.create_task(self._states.publish_all(connection), name="mqtt states")
        finally:
            with suppress(BrokerError, TimeoutError):
                async with asyncio.timeout(1):
                    await self._publish_liveness(connection, "ended")

    async def _publish_liveness(self, connection: Connection, state: Literal["up", "ended"]) -> None:
        await connection.publish(self._topics.state, _liveness(state), qos=1, retain=True)

    def _report(self, text: str) -> None:
        """Log a text and pass it to the user, unless it repeats the previous one."""
        if text != self._last_report:
            self._last_report = text
            report = f"MQTT broker at {self._broker.address}: {text}"
            logger.info("%s", report)
            self._tell(report)


def _liveness(state: Literal["up", "ended", "gone"]) -> bytes:
    return to_json(Liveness(state=state))


def _first_error(error: BaseException) -> BaseException:
    """Return the first error that is no group, at any depth of groups within groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
