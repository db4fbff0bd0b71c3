"""Routes that show and control the engines and the controller."""

import asyncio
from typing import Any

import pytest

from runtime.engines.fake import FakeEngine
from runtime.engines.handle import EngineState
from runtime.engines.supervised import Patience, SupervisedEngine
from tests.runtime.api.http.conftest import PROBLEM, Served, Start, pause_solver


async def test_engines_list_their_state_and_limits(served: Served) -> None:
    engines = {engine["name"]: engine for engine in (await served.client.get("/engines")).json()}
    assert list(engines) == ["planner", "solver", "critic"]
    solver = engines["solver"]
    assert (solver["state"], solver["seats"], solver["pinned"]) == ("ready", ["solver"], False)
    low, high = solver["limits"]["gpu_memory_utilization"]
    assert low <= solver["grant"]["gpu_memory_utilization"] <= high


async def test_pin_resizes_an_engine_until_it_is_unpinned(served: Served) -> None:
    engines = (await served.client.get("/engines")).json()
    share = engines[1]["grant"]["gpu_memory_utilization"] / 2
    pinned = await served.client.put("/control/pins/solver", json={"gpu_memory_utilization": share})
    assert pinned.status_code == 200, pinned.text
    assert pinned.json()["pinned"]["solver"]["gpu_memory_utilization"] == share
    async with asyncio.timeout(60):
        while (await served.client.get("/engines")).json()[1]["grant"]["gpu_memory_utilization"] != share:
            pass
    assert (await served.client.delete("/control/pins/solver")).json()["pinned"] == {}


async def test_engines_show_pauses_and_costs(start: Start) -> None:
    served = await start(time_scale=1)
    await pause_solver(served)
    planner, solver, _ = (await served.client.get("/engines")).json()
    assert (solver["grant"]["max_active_seqs"], planner["paused_s"]) == (0, 0)
    assert solver["paused_s"] >= 0.1
    assert {*solver["cost"]} == {"step_s", "sequence_s", "prompt_token_s", "confidence", "fault"}
    assert solver["cost"]["step_s"] > 0
    assert solver["cost"]["confidence"] > 0
    assert solver["utilization"] is None  # modelled engines have no process
    device = (await served.client.get("/devices")).json()["0"]
    assert device["lanes"] >= 1
    assert 0 <= device["lanes_confidence"] <= 1
    assert "utilization" in device


async def test_engines_are_listed_while_one_restarts(served: Served) -> None:
    may_start = asyncio.Event()
    may_start.set()

    class Waiting(FakeEngine):
        async def start(self) -> None:
            await may_start.wait()
            await super().start()

    engine = SupervisedEngine("solver", lambda grant: Waiting("solver", str), patience=Patience(backoff_s=(0,)))
    await engine.start()
    served.backend.ready_team().engines["solver"] = engine
    limits = (await served.client.get("/engines")).json()[1]["limits"]
    may_start.clear()
    engine.kill()
    async with asyncio.timeout(60):
        while engine.stats().state is not EngineState.STARTING:  # noqa: ASYNC110  there is no event for it
            await asyncio.sleep(0.01)
    response = await served.client.get("/engines")
    await engine.close()
    assert response.status_code == 200
    solver = response.json()[1]
    assert (solver["state"], solver["limits"]) == ("starting", limits)


async def test_each_replica_is_listed_with_its_device_and_pinned_by_its_name(start: Start) -> None:
    served = await start(time_scale=1, devices=2)
    engines = {engine["name"]: engine for engine in (await served.client.get("/engines")).json()}
    assert list(engines) == [f"{engine}@{device}" for device in "01" for engine in ("planner", "solver", "critic")]
    solver = engines["solver@1"]
    assert (solver["engine"], solver["device"], solver["seats"], solver["state"]) == (
        "solver",
        "1",
        ["solver"],
        "ready",
    )
    async with asyncio.timeout(60):
        while {*(await served.client.get("/devices")).json()} != {"0", "1"}:
            pass
    control = (await served.client.put("/control/pins/solver@1", json={"max_active_seqs": 4})).json()
    assert control["pinned"]["solver@1"]["max_active_seqs"] == 4
    unknown = await served.client.put("/control/pins/solver", json={"max_active_seqs": 4})
    assert unknown.status_code == 404
    assert "the engines are planner@0, solver@0" in unknown.json()["error"]["message"]
    answer = await served.client.post(
        "/v1/chat/completions", json={"model": "solver", "messages": [{"role": "user", "content": "1 2"}]}
    )
    assert answer.status_code == 200
    metrics = (await served.client.get("/metrics")).text
    assert 'troupe:lanes{device="1"}' in metrics
    assert 'vllm:num_requests_running{model_name="solver@1"}' in metrics


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"gpu_memory_utilization": 0}, "greater than 0"),
        ({"gpu_memory_utilization": 1e-9}, "below the engine's floor"),
        ({"gpu_memory_utilization": 0.9}, "less than their floors and pins; at most"),
        ({"max_active_seqs": 10**6}, "not within 0 to"),
        ({"colour": "red"}, "not permitted"),
    ],
)
async def test_invalid_pin_changes_nothing(served: Served, body: dict[str, Any], message: str) -> None:
    response = await served.client.put("/control/pins/solver", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert (await served.client.get("/control")).json()["pinned"] == {}


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_unknown_engine_is_not_found(served: Served, method: str) -> None:
    response = await served.client.request(method, "/control/pins/nobody", json={})
    assert (response.status_code, "the engines are planner, solver" in response.text) == (404, True)


async def test_policy_changes_and_controller_pauses(served: Served) -> None:
    changed = await served.client.patch("/control", json={"policy": {"name": "static"}, "paused": True})
    assert (changed.json()["policy"], changed.json()["paused"]) == ("static", True)
    unknown = await served.client.patch("/control", json={"policy": {"name": "statik"}, "paused": False})
    assert (unknown.status_code, "static" in unknown.text) == (400, True)
    unknown_option = await served.client.patch("/control", json={"policy": {"name": "waterfill", "damp": 1}})
    assert (unknown_option.status_code, "damping" in unknown_option.text) == (400, True)
    control = (await served.client.get("/control")).json()
    assert (control["policy"], control["paused"]) == ("static", True)


async def test_decisions_have_reasons(start: Start) -> None:
    served = await start(time_scale=1)
    async with asyncio.timeout(60):
        while not (decisions := (await served.client.get("/control/decisions")).json()):
            await served.client.post("/jobs", json={"problem": PROBLEM})
    assert decisions[0]["policy"] == "turns"
    assert all(engine["reason"] for engine in decisions[0]["engines"].values())
