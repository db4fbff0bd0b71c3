"""Connections to an MQTT 3.1.1 broker. The only module that imports aiomqtt."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt

from runtime.config import Mqtt
from runtime.errors import ConfigError

BrokerError = aiomqtt.MqttError
"""Raised if the broker cannot be reached, refuses a connection, or the connection is lost."""
Message = aiomqtt.Message

IN_FLIGHT_MAX = 500
"""Upper bound for published QoS 1 messages without acknowledgement, and for incoming messages being handled."""
KEEPALIVE_S = 10
TIMEOUT_S = 10.0
"""Bounds each call: to connect, to subscribe, and for a QoS 1 message to be acknowledged."""


class Broker:
    """The broker of a configuration. Raises ConfigError if its password or CA file cannot be read."""

    def __init__(self, config: Mqtt) -> None:
        self.address = f"{config.host}:{config.port}"
        self._config = config
        self._password = _read_password(config)
        self._tls = _tls_context(config)

    @asynccontextmanager
    async def connect(self, will_topic: str, will: bytes) -> AsyncIterator["Connection"]:
        """Open a connection and close it at the end. Raises BrokerError.

        The broker publishes `will`, retained, if the connection breaks.
        """
        config = self._config
        client = aiomqtt.Client(
            config.host,
            config.port,
            identifier=f"troupe-{config.cluster}",
            clean_session=False,  # the broker then queues submissions while the service is away
            username=config.username,
            password=self._password,
            tls_context=self._tls,
            will=aiomqtt.Will(will_topic, will, qos=1, retain=True),
            keepalive=KEEPALIVE_S,
            timeout=TIMEOUT_S,
            max_inflight_messages=IN_FLIGHT_MAX,
            max_queued_outgoing_messages=0,
            # IPPROTO_TCP, TCP_NODELAY: Nagle's algorithm would delay acknowledgements.
            socket_options=[(6, 1, 1)],
        )
        client._client.manual_ack_set(True)  # Connection.acknowledge sends them
        client.pending_calls_threshold = 4 * IN_FLIGHT_MAX
        async with client:
            yield Connection(client)


class Connection:
    """An open connection to a broker. Incoming messages are acknowledged by `acknowledge` only.

    All methods raise BrokerError if the connection is lost.
    """

    def __init__(self, client: aiomqtt.Client) -> None:
        self._client = client

    async def subscribe(self, *topics: str) -> None:
        """Subscribe to topics at QoS 1."""
        await self._client.subscribe([(topic, 1) for topic in topics])

    async def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool = False) -> None:
        """Publish a message. At QoS 1, return once the broker has acknowledged it."""
        await self._client.publish(topic, payload, qos=qos, retain=retain)

    @property
    def messages(self) -> AsyncIterator[Message]:
        """Incoming messages, in the order of their arrival."""
        return self._client.messages

    def acknowledge(self, message: Message) -> None:
        """Acknowledge an incoming message. MQTT 3.1.1 wants acknowledgements in the order of the messages (4.6)."""
        self._client._client.ack(message.mid, message.qos)  # aiomqtt does not expose paho's method


def raise_if_cancelled() -> None:
    """Raise CancelledError if the current task has been cancelled. Call it after each `publish` in an endless loop.

    On Python 3.11, the `wait_for` inside aiomqtt may swallow a cancellation, and the loop would never end. Don't call
    it in a task that enters several task groups in turn: a group that a failed child has broken off leaves its task
    marked as cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _read_password(config: Mqtt) -> str | None:
    if config.password_file is None:
        return None
    try:
        lines = Path(config.password_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"mqtt.password_file: cannot read {config.password_file}: {error}; give a text file with the password"
        ) from None
    if not lines or not lines[0]:
        raise ConfigError(
            f"mqtt.password_file: the first line of {config.password_file} is empty; it must hold the password"
        )
    return lines[0]


def _tls_context(config: Mqtt) -> ssl.SSLContext | None:
    if not config.tls and config.ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=config.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"mqtt.ca_file: cannot read {config.ca_file}: {error}; give a PEM file of certificates"
        ) from None
