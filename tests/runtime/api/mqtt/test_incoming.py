"""Submissions and commands, over real brokers."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from runtime.config import Mqtt
from runtime.jobs.submission import Submission
from tests.runtime.api.http.conftest import service
from tests.runtime.api.mqtt import brokers
from tests.runtime.api.mqtt.conftest import TOPICS, reader, with_broker, with_mosquitto


async def test_repeated_submissions_are_one_job(tmp_path: Path, mqtt: Mqtt) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt)) as served:
        await me.until(TOPICS.state, state="up")
        for _ in range(3):
            await me.submit("c1")
        await me.until(TOPICS.accepted("+"), new=False)
        await me.until(TOPICS.result("+"))
        assert len((await served.client.get("/jobs")).json()["jobs"]) == 1


@pytest.mark.parametrize(
    ("payload", "message", "correlation_id"),
    [
        (b"{", "JSON", None),
        (b"\xff\xfe", "JSON", None),
        (b"[]", "object", None),
        (b'{"problem": "1+1"}', "correlation_id: field required", None),
        (b'{"problem": "1+1", "correlation_id": "c", "colour": 1}', "colour", "c"),
        (b'{"problem": "1+1", "compare": "exact", "correlation_id": "c"}', "compare: there is no expected answer", "c"),
        (b'{"problem": "1000+1", "correlation_id": "c"}', "999", "c"),
        (b'{"problem": 1, "correlation_id": 7}', "problem", None),
    ],
)
async def test_invalid_submissions_are_rejected(
    tmp_path: Path, mqtt: Mqtt, payload: bytes, message: str, correlation_id: str | None
) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt)) as served:
        await me.until(TOPICS.state, state="up")
        await me.client.publish(TOPICS.submit, payload, qos=1)
        rejected = await me.until(TOPICS.rejected, correlation_id=correlation_id)
        assert message in rejected["error"]
        assert (await served.client.get("/jobs")).json()["jobs"] == []


async def test_commands_are_executed_or_refused(tmp_path: Path, mqtt: Mqtt) -> None:
    async with reader(mqtt) as me, service(with_broker(tmp_path, mqtt), time_scale=50) as served:
        await me.until(TOPICS.state, state="up")

        async def send(number: int, **command: Any) -> dict[str, Any]:
            payload = json.dumps({"correlation_id": str(number), **command})
            await me.client.publish(TOPICS.control, payload, qos=1)
            return await me.until(TOPICS.control_result, correlation_id=str(number))

        assert (await send(1, command="change", paused=True, policy={"name": "static"}))["error"] is None
        assert (await send(2, command="pin", engine="solver"))["error"] is None
        control = (await served.client.get("/control")).json()
        assert (control["policy"], control["paused"], [*control["pinned"]]) == ("static", True, ["solver"])
        assert (await send(3, command="unpin", engine="solver"))["error"] is None
        assert (await served.client.get("/control")).json()["pinned"] == {}
        greedy = await send(8, command="pin", engine="solver", gpu_memory_utilization=0.9)
        assert "less than their floors and pins; at most" in greedy["error"]
        assert "there is no engine 'nobody'" in (await send(4, command="pin", engine="nobody"))["error"]
        assert "command" in (await send(5, command="dance"))["error"]
        await me.submit("c1")
        job = (await me.until(TOPICS.accepted("+")))["id"]
        assert (await send(6, command="cancel", job=job))["error"] is None
        assert (await me.until(TOPICS.result(job)))["state"] == "cancelled"
        assert "there is no job" in (await send(7, command="cancel", job="nothing"))["error"]


@with_mosquitto
async def test_submissions_are_acknowledged_only_after_they_are_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the service ends before, the broker sends the submission to the next one."""
    async with brokers.mosquitto(tmp_path) as mqtt:
        config = with_broker(tmp_path, mqtt)
        async with AsyncExitStack() as owned:
            served = await owned.enter_async_context(service(config))
            me = await owned.enter_async_context(reader(mqtt))
            await me.until(TOPICS.state, state="up")
            received = asyncio.Event()

            async def never_written(submission: Submission) -> None:
                received.set()
                await asyncio.Event().wait()

            monkeypatch.setattr(served.backend.jobs, "submit", never_written)
            await me.submit("c1")
            await received.wait()
        async with reader(mqtt) as me, service(config):
            assert (await me.until(TOPICS.accepted("+"), correlation_id="c1"))["new"] is True


@with_mosquitto
async def test_submissions_wait_at_the_broker_while_the_service_is_away(tmp_path: Path) -> None:
    async with brokers.mosquitto(tmp_path) as mqtt:
        config = with_broker(tmp_path, mqtt)
        async with service(config) as served, reader(mqtt) as me:
            await me.until(TOPICS.state, state="up")
        async with reader(mqtt) as me:
            await me.submit("while away")
        async with AsyncExitStack() as owned:
            me = await owned.enter_async_context(reader(mqtt))
            served = await owned.enter_async_context(service(config))
            job = (await me.until(TOPICS.accepted("+"), correlation_id="while away"))["id"]
            assert (await me.until(TOPICS.result(job)))["state"] == "done"
            assert len((await served.client.get("/jobs")).json()["jobs"]) == 1
