"""Real brokers to test against: mosquitto as a process, and the embedded one."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.bus import embedded
from runtime.config import Mqtt
from tests.programs import MOSQUITTO

SAMPLE = Path(__file__).resolve().parents[3] / "configs" / "mosquitto.conf"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """A broker with the shipped sample configuration, on a port of its own, which can be killed and started again."""

    def __init__(self, folder: Path, more: str = "", anonymous: bool = True) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        text = SAMPLE.read_text().replace("listener 1883 127.0.0.1", f"listener {self.port} 127.0.0.1")
        text = text.replace("/var/lib/mosquitto/", f"{folder}/").replace("user mosquitto", "user root")
        if not anonymous:
            text = text.replace("allow_anonymous true", "allow_anonymous false")
        self._configuration = folder / "mosquitto.conf"
        self._configuration.write_text(text + more)

    async def start(self) -> None:
        assert MOSQUITTO is not None
        self._process = await asyncio.create_subprocess_exec(
            MOSQUITTO, "-c", str(self._configuration), stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(10):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                return

    async def stop(self, number: int = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        await self._process.wait()


@asynccontextmanager
async def mosquitto(folder: Path) -> AsyncIterator[Mqtt]:
    broker = Mosquitto(folder)
    await broker.start()
    try:
        yield Mqtt(port=broker.port)
    finally:
        await broker.stop()


@asynccontextmanager
async def embedded_broker(folder: Path) -> AsyncIterator[Mqtt]:
    async with embedded.broker(Mqtt(port=free_port()), folder) as mqtt:
        yield mqtt
