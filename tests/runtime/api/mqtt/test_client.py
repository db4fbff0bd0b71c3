"""The life of the service's MQTT client."""

import asyncio
import sys
from pathlib import Path

from runtime.config import Mqtt
from tests.runtime.api.mqtt.conftest import TOPICS, reader

ROOT = Path(__file__).resolve().parents[4]
SERVICE = """
import asyncio, sys
from pathlib import Path
from runtime.config import Mqtt
from tests.runtime.api.http.conftest import service
from tests.runtime.api.mqtt.conftest import with_broker

async def serve(folder: Path) -> None:
    async with service(with_broker(folder, Mqtt.model_validate_json((folder / "mqtt.json").read_bytes()))):
        await asyncio.sleep(60)

asyncio.run(serve(Path(sys.argv[1])))
"""
"""The program of a service that a test can kill."""


async def test_the_broker_reports_a_killed_service(tmp_path: Path, mqtt: Mqtt) -> None:
    """The embedded broker runs in the test's process here, so it outlives the service as mosquitto does."""
    (tmp_path / "mqtt.json").write_text(mqtt.model_dump_json())
    async with reader(mqtt) as me:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVICE, str(tmp_path), cwd=ROOT)
        await me.until(TOPICS.state, state="up")
        process.kill()
        await process.wait()
        await me.until(TOPICS.state, state="gone")
