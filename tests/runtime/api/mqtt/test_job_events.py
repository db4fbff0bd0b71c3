"""Job events and results, over real brokers."""

import signal
from pathlib import Path
from typing import Any

import pytest

from agents.tool_protocol import ToolCall
from runtime.config import Mqtt
from runtime.engines.usage import Usage
from runtime.jobs.job import JobState
from runtime.jobs.submission import Submission
from runtime.jobs.tool_record import ToolRecord
from scripts.mosquitto import Mosquitto
from tests.runtime.api.http.conftest import PROBLEM, service
from tests.runtime.api.mqtt import brokers
from tests.runtime.api.mqtt.conftest import TOPICS, reader, with_broker, with_mosquitto


async def test_a_submitted_job_is_accepted_worked_and_reported(tmp_path: Path, mqtt: Mqtt) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt)):
        await me.until(TOPICS.state, state="up")
        await me.submit("c1", expected="17")
        accepted = await me.until(TOPICS.accepted("+"), correlation_id="c1")
        assert accepted["new"] is True
        job = accepted["id"]
        result = await me.until(TOPICS.result(job))
        assert (result["state"], result["result"]["answer"], result["result"]["correct"]) == ("done", "17", True)
        kinds = [payload["kind"] for topic, payload in me.messages if topic == TOPICS.events(job)]
        assert kinds == ["queued", "running", *["replied"] * 9, "done"]
    async with reader(mqtt) as late:
        await late.until(TOPICS.state, state="ended")  # retained


@with_mosquitto
async def test_no_result_is_lost_when_the_broker_is_killed(tmp_path: Path) -> None:
    """Jobs run while the broker is away, and their results are published once it is back."""
    broker = Mosquitto(tmp_path)
    await broker.start()
    mqtt = Mqtt(port=broker.port)
    reports: list[str] = []
    async with service(with_broker(tmp_path, mqtt), time_scale=1, tell=reports.append) as served:
        async with reader(mqtt, "results") as me:
            await me.until(TOPICS.state, state="up")
        await broker.stop(signal.SIGKILL)
        jobs = [(await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"] for _ in range(30)]
        for job in jobs:
            await served.client.get(f"/jobs/{job}/result", params={"wait_s": 20})
        await broker.start()
        async with reader(mqtt, "results") as me:
            for job in jobs:
                assert (await me.until(TOPICS.result(job)))["state"] == "done"
            ids = [payload["id"] for topic, payload in me.messages if topic.endswith("/events")]
        assert ids == sorted(ids)
    await broker.stop()
    assert reports[0].endswith("connected")
    assert reports[-1].endswith("connected")
    assert all(text.endswith("trying again") and "TaskGroup" not in text for text in reports[1:-1])
    assert reports[1:-1]


@with_mosquitto
async def test_results_from_before_the_first_connection_are_published(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    async with service(with_broker(tmp_path, Mqtt(port=broker.port))) as served:
        job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
        await served.client.get(f"/jobs/{job}/result", params={"wait_s": 20})
        await broker.start()
        async with reader(Mqtt(port=broker.port)) as me:
            assert (await me.until(TOPICS.result(job)))["state"] == "done"
    await broker.stop()


async def test_event_that_json_cannot_hold_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A journal of an earlier version may hold arguments that are nested deeper than pydantic writes."""
    arguments: dict[str, Any] = {}
    for _ in range(300):
        arguments = {"a": arguments}
    called = ToolRecord(1, "solver", "task", ToolCall("python", arguments, "{}"), Usage())
    async with brokers.embedded(tmp_path) as mqtt, reader(mqtt) as me, service(with_broker(tmp_path, mqtt)) as served:
        await me.until(TOPICS.state, state="up")
        write = served.backend.jobs.journal.write
        await write(lambda t: t.accept("old", Submission(problem=PROBLEM)))
        await write(lambda t: t.add_tool_call("old", called))
        await write(lambda t: t.move("old", JobState.CANCELLED))
        assert (await me.until(TOPICS.result("old")))["state"] == "cancelled"
        kinds = [payload["kind"] for topic, payload in me.messages if topic == TOPICS.events("old")]
    assert kinds == ["queued", "cancelled"]
    assert "an event of job old is not published" in caplog.text
