"""The reference of topics and payloads against what a service publishes."""

import asyncio
import json
import re
from pathlib import Path

import aiomqtt
import jsonschema

from runtime.api.mqtt import messages
from runtime.api.mqtt.messages import reference
from runtime.config import Mqtt
from tests.runtime.api.http.conftest import service
from tests.runtime.api.mqtt.conftest import TOPICS, reader, with_broker


def pattern(topic: str) -> str:
    """Return the subscription that matches a topic of the reference."""
    return re.sub("<[^>]+>", "+", topic)


async def test_published_messages_match_the_reference(tmp_path: Path, mqtt: Mqtt) -> None:
    """Every message that a service publishes has a topic of the reference and fits its schema."""
    async with reader(mqtt) as me:
        async with service(with_broker(tmp_path, mqtt), time_scale=1) as served:
            await me.until(TOPICS.state, state="up")
            await asyncio.gather(*(me.submit(str(number)) for number in range(60)))
            await me.client.publish(TOPICS.submit, b"no JSON", qos=1)
            await me.client.publish(TOPICS.control, json.dumps({"command": "pin", "engine": "solver"}), qos=1)
            await me.until(TOPICS.control_result)
            await me.until(TOPICS.rejected)
            await me.until(TOPICS.decision)
            for topic in [topic for topic, _ in me.messages if topic.endswith("/accepted")]:
                await me.until(topic.replace("/accepted", "/result"))
            assert served.backend.monitor.decisions
        await me.until(TOPICS.state, state="ended")
    outgoing = {pattern(info.topic): info.payload.json_schema() for info in reference("main") if not info.incoming}
    seen = set()
    for topic, payload in me.messages:
        (fitting,) = [name for name in outgoing if aiomqtt.Topic(topic).matches(name)]
        seen.add(fitting)
        jsonschema.validate(payload, outgoing[fitting])
    assert seen == set(outgoing)


def test_the_reference_has_the_incoming_topics() -> None:
    incoming = {info.topic: info.payload.json_schema() for info in reference("main") if info.incoming}
    assert set(incoming[TOPICS.submit]["required"]) == {"problem", "correlation_id"}
    assert {"change", "pin", "unpin", "cancel"} == set(incoming[TOPICS.control]["discriminator"]["mapping"])


def test_the_readme_has_every_topic() -> None:
    readme = (Path(messages.__file__).parent / "README.md").read_text()
    topics = [info.topic.removeprefix("troupe/main/") for info in reference("main")]
    assert [topic for topic in topics if f"| `{topic}` |" not in readme] == []
