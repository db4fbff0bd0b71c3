"""Real brokers for the tests: mosquitto in a process of its own, and the embedded broker."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.api.mqtt import embedded_broker
from runtime.config import Mqtt
from scripts.mosquitto import Mosquitto, free_port


@asynccontextmanager
async def mosquitto(folder: Path) -> AsyncIterator[Mqtt]:
    async with Mosquitto(folder) as broker:
        yield Mqtt(port=broker.port)


@asynccontextmanager
async def embedded(folder: Path) -> AsyncIterator[Mqtt]:
    async with embedded_broker.broker(Mqtt(port=free_port()), folder) as mqtt:
        yield mqtt
