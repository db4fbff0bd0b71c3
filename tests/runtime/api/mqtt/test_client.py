"""Jobs, states and commands over real brokers."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
import jsonschema
import pytest

from runtime.api.mqtt.messages import Topics, reference
from runtime.api.serve import background
from runtime.config import Config, Mqtt
from runtime.jobs.submission import Submission
from scripts.mosquitto import Mosquitto
from tests.programs import MOSQUITTO, needs
from tests.runtime.api.http.conftest import PROBLEM, configured, service
from tests.runtime.api.mqtt import brokers

BROKERS = {"mosquitto": brokers.mosquitto, "embedded": brokers.embedded}
T = Topics("main")
ROOT = Path(__file__).resolve().parents[4]
KILLED = """
import asyncio, sys
from pathlib import Path
from runtime.config import Mqtt
from tests.runtime.api.mqtt.test_client import with_broker
from tests.runtime.api.http.conftest import service

async def serve(folder: Path) -> None:
    async with service(with_broker(folder, Mqtt.model_validate_json((folder / "mqtt.json").read_bytes()))):
        await asyncio.sleep(60)

asyncio.run(serve(Path(sys.argv[1])))
"""
"""A service in a process of its own."""


with_mosquitto = needs(MOSQUITTO, "mosquitto")


@pytest.fixture(params=[pytest.param("mosquitto", marks=with_mosquitto), "embedded"])
async def mqtt(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Mqtt]:
    async with BROKERS[request.param](tmp_path) as mqtt:
        yield mqtt


@dataclass
class Reader:
    """A client of the broker that collects what the service sends; its own messages, which come to it too, are none."""

    client: aiomqtt.Client
    messages: list[tuple[str, Any]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def collect(self) -> None:
        async for message in self.client.messages:
            assert isinstance(message.payload, bytes)
            if str(message.topic) not in (T.submit, T.control):
                self.messages.append((str(message.topic), json.loads(message.payload)))
                self.arrived.set()

    async def until(self, topic: str, **having: Any) -> dict[str, Any]:
        """The first message of a topic (`+` for any level) with these fields."""
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
        await self.client.publish(T.submit, payload, qos=1)


def client_password(mqtt: Mqtt) -> str | None:
    return Path(mqtt.password_file).read_text().splitlines()[0] if mqtt.password_file else None


@asynccontextmanager
async def reader(mqtt: Mqtt, name: str | None = None) -> AsyncIterator[Reader]:
    """One with a name is remembered by the broker: what comes while it is away waits for it."""
    client = aiomqtt.Client(
        mqtt.host,
        mqtt.port,
        username=mqtt.username,
        password=client_password(mqtt),
        identifier=name,
        clean_session=name is None,
    )
    async with client:
        await client.subscribe("troupe/#", qos=1)
        found = Reader(client)
        async with background(found.collect(), "reader"):
            yield found


def with_broker(folder: Path, mqtt: Mqtt) -> Config:
    return configured(folder).model_copy(update={"mqtt": mqtt})


async def test_a_job_goes_its_way(tmp_path: Path, mqtt: Mqtt) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt)):
        await me.until(T.state, state="up")
        await me.submit("c1", expected="17")
        accepted = await me.until(T.accepted("+"), correlation_id="c1")
        assert accepted["new"] is True
        job = accepted["id"]
        result = await me.until(T.result(job))
        assert (result["state"], result["result"]["answer"], result["result"]["correct"]) == ("done", "17", True)
        kinds = [payload["kind"] for topic, payload in me.messages if topic == T.events(job)]
        assert kinds == ["queued", "running", *["replied"] * 9, "done"]
    async with reader(mqtt) as late:
        await late.until(T.state, state="ended")  # retained


async def test_a_message_that_comes_twice_is_one_job(tmp_path: Path, mqtt: Mqtt) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt)) as served:
        await me.until(T.state, state="up")
        for _ in range(3):
            await me.submit("c1")
        await me.until(T.accepted("+"), new=False)
        await me.until(T.result("+"))
        assert len((await served.client.get("/jobs")).json()["jobs"]) == 1


@pytest.mark.parametrize(
    ("payload", "says", "correlated"),
    [
        (b"{", "JSON", None),
        (b"\xff\xfe", "JSON", None),
        (b"[]", "object", None),
        (b'{"problem": "1+1"}', "correlation_id: field required", None),
        (b'{"problem": "1+1", "correlation_id": "c", "colour": 1}', "colour", "c"),
        (b'{"problem": "1000+1", "correlation_id": "c"}', "999", "c"),
        (b'{"problem": 1, "correlation_id": 7}', "problem", None),
    ],
)
async def test_what_is_wrong_is_rejected_by_name(
    tmp_path: Path, mqtt: Mqtt, payload: bytes, says: str, correlated: str | None
) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt)) as served:
        await me.until(T.state, state="up")
        await me.client.publish(T.submit, payload, qos=1)
        rejected = await me.until(T.rejected, correlation_id=correlated)
        assert says in rejected["error"]
        assert (await served.client.get("/jobs")).json()["jobs"] == []


async def test_states_are_retained(tmp_path: Path, mqtt: Mqtt) -> None:
    async with service(with_broker(tmp_path, mqtt), time_scale=1) as served:
        await asyncio.gather(*(served.client.post("/jobs", json={"problem": PROBLEM}) for _ in range(60)))
        async with asyncio.timeout(60):
            while not served.backend.monitor.decisions:  # noqa: ASYNC110  there is no event for it
                await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        async with reader(mqtt) as late:
            role = await late.until(T.role("solver"), state="ready")
            grant = await late.until(T.grant("solver"))
            await late.until(T.device(0))
            decision = await late.until(T.decision)
    assert role["engine"] == "solver"
    assert 0 < grant["gpu_memory_utilization"] <= 1
    assert decision["policy"] == "waterfill"


async def test_commands_are_obeyed_or_refused(tmp_path: Path, mqtt: Mqtt) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt), time_scale=50) as served:
        await me.until(T.state, state="up")

        async def tell(number: int, **command: Any) -> dict[str, Any]:
            payload = json.dumps({"correlation_id": str(number), **command})
            await me.client.publish(T.control, payload, qos=1)
            return await me.until(T.control_result, correlation_id=str(number))

        assert (await tell(1, command="change", paused=True, policy={"name": "static"}))["error"] is None
        assert (await tell(2, command="pin", engine="solver"))["error"] is None
        now = (await served.client.get("/control")).json()
        assert (now["policy"], now["paused"], [*now["pinned"]]) == ("static", True, ["solver"])
        assert (await tell(3, command="unpin", engine="solver"))["error"] is None
        assert (await served.client.get("/control")).json()["pinned"] == {}
        greedy = await tell(8, command="pin", engine="solver", gpu_memory_utilization=0.9)
        assert "less than their floors and pins; at most" in greedy["error"]
        assert "there is no engine 'nobody'" in (await tell(4, command="pin", engine="nobody"))["error"]
        assert "command" in (await tell(5, command="dance"))["error"]
        await me.submit("c1")
        job = (await me.until(T.accepted("+")))["id"]
        assert (await tell(6, command="cancel", job=job))["error"] is None
        assert (await me.until(T.result(job)))["state"] == "cancelled"
        assert "there is no job" in (await tell(7, command="cancel", job="nothing"))["error"]


@with_mosquitto
async def test_a_broker_that_dies_loses_no_result(tmp_path: Path) -> None:
    """Jobs go on while it is away, and what happened is told when it is back."""
    broker = Mosquitto(tmp_path)
    await broker.start()
    mqtt = Mqtt(port=broker.port)
    said: list[str] = []
    async with service(with_broker(tmp_path, mqtt), time_scale=1, tell=said.append) as served:
        async with reader(mqtt, "results") as me:
            await me.until(T.state, state="up")
        await broker.stop(signal.SIGKILL)
        jobs = [(await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"] for _ in range(30)]
        for job in jobs:
            await served.client.get(f"/jobs/{job}/result", params={"wait_s": 20})
        await broker.start()
        async with reader(mqtt, "results") as me:
            for job in jobs:
                assert (await me.until(T.result(job)))["state"] == "done"
            ids = [payload["id"] for topic, payload in me.messages if topic.endswith("/events")]
        assert ids == sorted(ids)
    await broker.stop()
    assert said[0].endswith("connected")
    assert said[-1].endswith("connected")
    assert all(text.endswith("trying again") and "TaskGroup" not in text for text in said[1:-1])
    assert said[1:-1]


@with_mosquitto
async def test_results_from_before_the_first_connection_are_sent(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    async with service(with_broker(tmp_path, Mqtt(port=broker.port))) as served:
        job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
        await served.client.get(f"/jobs/{job}/result", params={"wait_s": 20})
        await broker.start()
        async with reader(Mqtt(port=broker.port)) as me:
            assert (await me.until(T.result(job)))["state"] == "done"
    await broker.stop()


@with_mosquitto
async def test_a_submission_is_acknowledged_after_it_is_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker sends it again to the next runtime if this one ends before."""
    async with brokers.mosquitto(tmp_path) as mqtt:
        chosen = with_broker(tmp_path, mqtt)
        async with AsyncExitStack() as owned:
            served = await owned.enter_async_context(service(chosen))
            me = await owned.enter_async_context(reader(mqtt))
            await me.until(T.state, state="up")
            taken = asyncio.Event()

            async def never_written(submission: Submission) -> None:
                taken.set()
                await asyncio.Event().wait()

            monkeypatch.setattr(served.backend.jobs, "submit", never_written)
            await me.submit("c1")
            await taken.wait()
        async with reader(mqtt) as me, service(chosen):
            assert (await me.until(T.accepted("+"), correlation_id="c1"))["new"] is True


@with_mosquitto
async def test_what_comes_while_the_service_is_away_waits(tmp_path: Path) -> None:
    """Submissions at the broker, results in the journal."""
    async with brokers.mosquitto(tmp_path) as mqtt:
        chosen = with_broker(tmp_path, mqtt)
        async with service(chosen) as served, reader(mqtt) as me:
            await me.until(T.state, state="up")
        async with reader(mqtt) as me:
            await me.submit("while away")
        async with AsyncExitStack() as owned:
            me = await owned.enter_async_context(reader(mqtt))
            served = await owned.enter_async_context(service(chosen))
            job = (await me.until(T.accepted("+"), correlation_id="while away"))["id"]
            assert (await me.until(T.result(job)))["state"] == "done"
            assert len((await served.client.get("/jobs")).json()["jobs"]) == 1


async def test_a_service_that_is_killed_is_told_by_its_will(tmp_path: Path, mqtt: Mqtt) -> None:
    """By the broker, as soon as the connection breaks. The embedded broker stands for one that outlives the service."""
    (tmp_path / "mqtt.json").write_text(mqtt.model_dump_json())
    async with reader(mqtt) as me:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, str(tmp_path), cwd=ROOT)
        await me.until(T.state, state="up")
        process.kill()
        await process.wait()
        await me.until(T.state, state="gone")


def pattern(topic: str) -> str:
    """A topic of the reference, as a subscription has it."""
    return re.sub("<[^>]+>", "+", topic)


async def test_what_goes_out_is_as_the_reference_says(tmp_path: Path, mqtt: Mqtt) -> None:
    """Every message of a service's life is of a topic that the reference has, and fits its schema."""
    async with reader(mqtt) as me:
        async with service(with_broker(tmp_path, mqtt), time_scale=1) as served:
            await me.until(T.state, state="up")
            await asyncio.gather(*(me.submit(str(number)) for number in range(60)))
            await me.client.publish(T.submit, b"no JSON", qos=1)
            await me.client.publish(T.control, json.dumps({"command": "pin", "engine": "solver"}), qos=1)
            await me.until(T.control_result)
            await me.until(T.rejected)
            await me.until(T.decision)
            for topic in [topic for topic, _ in me.messages if topic.endswith("/accepted")]:
                await me.until(topic.replace("/accepted", "/result"))
            assert served.backend.monitor.decisions
        await me.until(T.state, state="ended")
    outgoing = {pattern(info.topic): info.payload.json_schema() for info in reference("main") if not info.comes_in}
    seen = set()
    for topic, payload in me.messages:
        (fitting,) = [name for name in outgoing if aiomqtt.Topic(topic).matches(name)]
        seen.add(fitting)
        jsonschema.validate(payload, outgoing[fitting])
    assert seen == set(outgoing)


def test_the_reference_says_what_comes_in() -> None:
    incoming = {info.topic: info.payload.json_schema() for info in reference("main") if info.comes_in}
    assert set(incoming[T.submit]["required"]) == {"problem", "correlation_id"}
    assert {"change", "pin", "unpin", "cancel"} == set(incoming[T.control]["discriminator"]["mapping"])
