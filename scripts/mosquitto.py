"""Runs mosquitto with the shipped sample configuration, for measurements and tests.

The broker uses a free port and a folder of the caller, and can be killed and started again.
"""

import asyncio
import shutil
import signal
import socket
from pathlib import Path
from typing import Self

PROGRAM = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/opt/homebrew/sbin")
SAMPLE = Path(__file__).resolve().parent.parent / "configs" / "mosquitto.conf"


def free_port() -> int:
    """Return a port of localhost on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """An async context manager that runs the broker.

    With `durable` False, the broker keeps messages in memory only. `more` is appended to its configuration.
    """

    def __init__(self, folder: Path, *, durable: bool = True, anonymous: bool = True, more: str = "") -> None:
        self.port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        text = SAMPLE.read_text().replace("listener 1883 127.0.0.1", f"listener {self.port} 127.0.0.1")
        text = text.replace("/var/lib/mosquitto/", f"{folder}/").replace("user mosquitto", "user root")
        if not durable:
            text = text.replace("persistence true", "persistence false")
        if not anonymous:
            text = text.replace("allow_anonymous true", "allow_anonymous false")
        self._configuration = folder / "mosquitto.conf"
        self._configuration.write_text(text + more)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self.is_down:
            await self.stop()

    @property
    def is_down(self) -> bool:
        """True if the broker was not started yet, or was stopped."""
        return self._process is None or self._process.returncode is not None

    async def start(self) -> None:
        """Start the broker and return once it accepts connections. Raises TimeoutError after 10 s."""
        assert PROGRAM is not None
        self._process = await asyncio.create_subprocess_exec(
            PROGRAM, "-c", str(self._configuration), stderr=asyncio.subprocess.DEVNULL
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
        """Send the broker a signal and wait for its end. SIGKILL simulates a crash."""
        assert self._process is not None
        self._process.send_signal(number)
        await self._process.wait()
