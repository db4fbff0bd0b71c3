"""Retained states, over real brokers."""

import asyncio
from pathlib import Path

from runtime.config import Mqtt
from tests.runtime.api.http.conftest import PROBLEM, service
from tests.runtime.api.mqtt.conftest import TOPICS, reader, with_broker


async def test_states_are_retained(tmp_path: Path, mqtt: Mqtt) -> None:
    async with service(with_broker(tmp_path, mqtt), time_scale=1) as served:
        await asyncio.gather(*(served.client.post("/jobs", json={"problem": PROBLEM}) for _ in range(60)))
        async with asyncio.timeout(60):
            while not served.backend.monitor.decisions:  # noqa: ASYNC110  there is no event for it
                await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        async with reader(mqtt) as late:
            role = await late.until(TOPICS.role("solver"), state="ready")
            grant = await late.until(TOPICS.grant("solver"))
            device = await late.until(TOPICS.device("0"))
            decision = await late.until(TOPICS.decision)
    assert role["engine"] == "solver"
    assert role["now"]["paused_s"] == 0
    assert role["now"]["cost"]["step_s"] > 0
    assert device["lanes"] >= 1
    assert 0 <= device["lanes_confidence"] <= 1
    assert 0 < grant["gpu_memory_utilization"] <= 1
    assert decision["policy"] == "turns"


async def test_a_role_s_state_covers_the_replicas_of_all_devices(tmp_path: Path, mqtt: Mqtt) -> None:
    async with service(with_broker(tmp_path, mqtt), time_scale=1, devices=2) as served:
        await asyncio.sleep(1)
        async with reader(mqtt) as late:
            role = await late.until(TOPICS.role("solver"), state="ready")
            grants = [await late.until(TOPICS.grant(f"solver@{device}")) for device in (0, 1)]
            assert (await late.until(TOPICS.device("1")))["lanes"] >= 1
        limits = served.backend.engines["solver@0"].limits
    assert role["engine"] == "solver"
    assert role["now"]["kv_cache_bytes"] == sum(grant["kv_cache_bytes"] for grant in grants)
    assert role["now"]["max_active_seqs"] <= 2 * limits.seqs_ceiling
