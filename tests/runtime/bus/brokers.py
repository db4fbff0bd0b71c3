"""Real brokers to test against: mosquitto as a process, and the embedded one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.bus import embedded
from runtime.config import Mqtt
from scripts.mosquitto import Mosquitto, free_port


@asynccontextmanager
async def mosquitto(folder: Path) -> AsyncIterator[Mqtt]:
    async with Mosquitto(folder) as broker:
        yield Mqtt(port=broker.port)


@asynccontextmanager
async def embedded_broker(folder: Path) -> AsyncIterator[Mqtt]:
    async with embedded.broker(Mqtt(port=free_port()), folder) as mqtt:
        yield mqtt
