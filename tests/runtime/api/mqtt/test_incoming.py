"""Submissions and commands, over real brokers."""

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.api.mqtt.embedded_broker import PASSWORD_FILE, USER
from runtime.api.serve import drain
from runtime.config import Mqtt
from runtime.errors import JournalError
from runtime.jobs.journal.records import JobRecord
from runtime.jobs.journal.transaction import Transaction
from runtime.jobs.submission import Submission
from scripts.mosquitto import free_port
from tests.runtime.api.http.conftest import configured, service
from tests.runtime.api.mqtt import brokers
from tests.runtime.api.mqtt.conftest import TOPICS, reader, with_broker, with_mosquitto
from tests.runtime.jobs.test_service import wait_until


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
async def test_messages_during_a_drain_are_left_to_the_next_start(tmp_path: Path) -> None:
    """The results of running jobs are still published, and a command that needs no engine is executed."""
    async with brokers.mosquitto(tmp_path) as mqtt, reader(mqtt) as me:
        config = with_broker(tmp_path, mqtt)
        async with service(config, time_scale=1) as served:
            await me.until(TOPICS.state, state="up")
            await me.submit("before")
            job = (await me.until(TOPICS.accepted("+"), correlation_id="before"))["id"]
            await me.until(TOPICS.events(job), kind="running")
            draining = asyncio.create_task(drain(served.backend, 60))
            await asyncio.sleep(0)
            await me.submit("during")
            for number, command in enumerate(
                ({"command": "pin", "engine": "solver"}, {"command": "cancel", "job": "x"})
            ):
                await me.client.publish(TOPICS.control, json.dumps({"correlation_id": str(number), **command}), qos=1)
            assert "there is no job" in (await me.until(TOPICS.control_result, correlation_id="1"))["error"]
            assert (await me.until(TOPICS.result(job)))["state"] == "done"
            assert await draining == 0
        answered = {payload.get("correlation_id") for _, payload in me.messages}
        assert answered.isdisjoint({"during", "0"})
        async with service(config):
            assert (await me.until(TOPICS.accepted("+"), correlation_id="during"))["new"] is True
            await me.until(TOPICS.control_result, correlation_id="0")


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """Let the journal accept no job meanwhile. Yield the list to which each try adds the job's idempotency key."""
    tries: list[str | None] = []

    def fail(transaction: Transaction, id: str, submission: Submission) -> None:
        tries.append(submission.idempotency_key)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as fault:
        fault.setattr(Transaction, "accept", fail)
        yield tries


@with_mosquitto
async def test_submissions_during_a_journal_fault_wait_at_the_broker_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.api.mqtt.incoming.RETRY_S", 0.01)
    async with brokers.mosquitto(tmp_path) as mqtt, reader(mqtt) as me:
        config = with_broker(tmp_path, mqtt)
        with full_disk(monkeypatch) as tries:
            async with service(config):
                await me.until(TOPICS.state, state="up")
                await me.submit("c1")
                await wait_until(lambda: len(tries) > 2 or TOPICS.rejected in dict(me.messages))
        assert TOPICS.rejected not in dict(me.messages)
        async with service(config):
            await me.until(TOPICS.accepted("+"), correlation_id="c1")


@pytest.mark.parametrize("embedded", [pytest.param(False, marks=with_mosquitto), True], ids=["QoS 0", "embedded"])
async def test_messages_that_the_broker_would_not_send_again_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    """Neither a drain nor a fault of the journal holds them."""
    async with AsyncExitStack() as owned:
        if embedded:
            monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
            mqtt = Mqtt(port=free_port(), username=USER, password_file=str(tmp_path / PASSWORD_FILE))
        else:
            mqtt = await owned.enter_async_context(brokers.mosquitto(tmp_path))
        served = await owned.enter_async_context(service(with_broker(tmp_path, mqtt), with_broker=embedded))
        me = await owned.enter_async_context(reader(mqtt))
        await me.until(TOPICS.state, state="up")

        async def send(topic: str, **payload: str) -> None:
            await me.client.publish(topic, json.dumps(payload), qos=int(embedded))

        with full_disk(monkeypatch):
            await send(TOPICS.submit, problem="1+1", correlation_id="full")
            assert "disk is full" in (await me.until(TOPICS.rejected, correlation_id="full"))["error"]
        draining = asyncio.create_task(drain(served.backend, 60))
        await asyncio.sleep(0)
        await send(TOPICS.submit, problem="1+1", correlation_id="late")
        assert "is stopping" in (await me.until(TOPICS.rejected, correlation_id="late"))["error"]
        await send(TOPICS.control, command="unpin", engine="solver", correlation_id="late")
        assert "try again later" in (await me.until(TOPICS.control_result, correlation_id="late"))["error"]
        await draining


@with_mosquitto
async def test_submissions_keep_their_order_over_a_journal_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.api.mqtt.incoming.RETRY_S", 0.01)
    async with brokers.mosquitto(tmp_path) as mqtt, reader(mqtt) as me, service(with_broker(tmp_path, mqtt)) as served:
        await me.until(TOPICS.state, state="up")
        with full_disk(monkeypatch) as tries:
            await asyncio.gather(*map(me.submit, "123"))
            await wait_until(lambda: bool(tries))
            await asyncio.gather(*map(me.submit, "456"))
            await me.client.publish(TOPICS.control, b"{}", qos=1)
            await me.until(TOPICS.control_result)  # so all submissions have arrived
            tries.clear()
            # Only the first of those that wait tries again. Its second try began after the first tries of the others.
            await wait_until(lambda: max(Counter(tries).values(), default=0) > 1)
        for key in "123456":
            await me.until(TOPICS.accepted("+"), correlation_id=key)
        jobs = (await served.client.get("/jobs")).json()["jobs"]
        assert [job["idempotency_key"] for job in jobs] == [*"654321"]


@with_mosquitto
async def test_waiting_submissions_are_first_come_first_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault becomes known for submission 1, then for submission 2. Submission 3 arrives in between, 4 later."""
    monkeypatch.setattr("runtime.api.mqtt.incoming.RETRY_S", 0.01)
    async with brokers.mosquitto(tmp_path) as mqtt, reader(mqtt) as me, service(with_broker(tmp_path, mqtt)) as served:
        await me.until(TOPICS.state, state="up")
        submit, tries, is_full = served.backend.jobs.submit, list[str | None](), True
        failed = {"1": asyncio.Event(), "2": asyncio.Event()}

        async def faulty(submission: Submission) -> tuple[JobRecord, bool]:
            tries.append(key := submission.idempotency_key)
            if is_full:
                await failed[str(key)].wait()
                raise JournalError("database or disk is full")
            return await submit(submission)

        async def send(key: str) -> None:
            await me.submit(key)
            payload = json.dumps({"correlation_id": key})
            await me.client.publish(TOPICS.control, payload, qos=1)
            await me.until(TOPICS.control_result, correlation_id=key)  # so the submission has arrived

        monkeypatch.setattr(served.backend.jobs, "submit", faulty)
        await send("1")
        await send("2")
        failed["1"].set()
        await wait_until(lambda: tries.count("1") > 1)
        await send("3")
        failed["2"].set()
        await send("4")
        is_full = False
        tries.clear()
        for key in "1234":
            await me.until(TOPICS.accepted("+"), correlation_id=key)
        assert tries == [*"1324"]


async def test_full_queue_rejects_submissions(tmp_path: Path, mqtt: Mqtt) -> None:
    config = configured(tmp_path, jobs_at_once=1, queue_max=1).model_copy(update={"mqtt": mqtt})
    async with reader(mqtt) as me, service(config, time_scale=50):
        await me.until(TOPICS.state, state="up")
        await me.submit("running")
        await me.until(TOPICS.events("+"), kind="running")
        await me.submit("waiting")
        await me.until(TOPICS.accepted("+"), correlation_id="waiting")
        await me.submit("rejected")
        assert "the queue is full" in (await me.until(TOPICS.rejected, correlation_id="rejected"))["error"]


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
