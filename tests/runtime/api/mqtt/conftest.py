"""What the MQTT tests share: brokers, services that use them, and a client that collects what a service publishes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from runtime.api.mqtt.messages import Topics
from runtime.api.serve import background
from runtime.config import Config, Mqtt
from tests.programs import MOSQUITTO, needs
from tests.runtime.api.http.conftest import PROBLEM, configured
from tests.runtime.api.mqtt import brokers

BROKERS = {"mosquitto": brokers.mosquitto, "embedded": brokers.embedded}
TOPICS = Topics("main")

with_mosquitto = needs(MOSQUITTO, "mosquitto")


@pytest.fixture(params=[pytest.param("mosquitto", marks=with_mosquitto), "embedded"])
async def mqtt(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Mqtt]:
    """The settings of a running broker, once for each kind of broker."""
    async with BROKERS[request.param](tmp_path) as mqtt:
        yield mqtt


@dataclass
class Reader:
    """A client that collects the service's messages. It skips the topics that clients write to."""

    client: aiomqtt.Client
    messages: list[tuple[str, Any]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def collect(self) -> None:
        async for message in self.client.messages:
            assert isinstance(message.payload, bytes)
            if str(message.topic) not in (TOPICS.submit, TOPICS.control):
                self.messages.append((str(message.topic), json.loads(message.payload)))
                self.arrived.set()

    async def until(self, topic: str, **having: Any) -> dict[str, Any]:
        """Wait for the first message with these fields on a topic (`+` stands for any level), and return it."""
        seen = 0
        async with asyncio.timeout(60):
            while True:
                self.arrived.clear()
                for name, payload in self.messages[seen:]:
                    if aiomqtt.Topic(name).matches(topic) and having.items() <= payload.items():
                        found: dict[str, Any] = payload
                        return found
                seen = len(self.messages)
                await self.arrived.wait()

    async def submit(self, correlation_id: str, **job: Any) -> None:
        payload = json.dumps({"problem": PROBLEM, "correlation_id": correlation_id, **job})
        await self.client.publish(TOPICS.submit, payload, qos=1)


@asynccontextmanager
async def reader(mqtt: Mqtt, name: str | None = None) -> AsyncIterator[Reader]:
    """Connect a reader. The broker queues messages for a reader with a name while it is away."""
    client = aiomqtt.Client(
        mqtt.host,
        mqtt.port,
        username=mqtt.username,
        password=_password(mqtt),
        identifier=name,
        clean_session=name is None,
    )
    async with client:
        await client.subscribe("troupe/#", qos=1)
        collecting = Reader(client)
        async with background(collecting.collect(), "reader"):
            yield collecting


def _password(mqtt: Mqtt) -> str | None:
    return Path(mqtt.password_file).read_text().splitlines()[0] if mqtt.password_file else None


def with_broker(folder: Path, mqtt: Mqtt) -> Config:
    """Return the configuration of a service with its files in a folder, and a broker."""
    return configured(folder).model_copy(update={"mqtt": mqtt})
