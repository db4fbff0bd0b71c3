"""Looking at engines and telling the controller, over HTTP."""

import asyncio
import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.runtime.api.http.conftest import PROBLEM, Served, Start


async def test_engines_say_what_they_are(served: Served) -> None:
    engines = {engine["name"]: engine for engine in (await served.client.get("/engines")).json()}
    assert list(engines) == ["planner", "solver", "critic"]
    solver = engines["solver"]
    assert (solver["state"], solver["seats"], solver["pinned"]) == ("ready", ["solver"], False)
    low, high = solver["limits"]["gpu_memory_utilization"]
    assert low <= solver["grant"]["gpu_memory_utilization"] <= high


async def test_an_engine_is_pinned_and_unpinned(served: Served) -> None:
    engines = (await served.client.get("/engines")).json()
    share = engines[1]["grant"]["gpu_memory_utilization"] / 2
    pinned = await served.client.put("/control/pins/solver", json={"gpu_memory_utilization": share})
    assert pinned.status_code == 200, pinned.text
    assert pinned.json()["pinned"]["solver"]["gpu_memory_utilization"] == share
    async with asyncio.timeout(60):
        while (await served.client.get("/engines")).json()[1]["grant"]["gpu_memory_utilization"] != share:
            pass
    assert (await served.client.delete("/control/pins/solver")).json()["pinned"] == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"gpu_memory_utilization": 0}, "greater than 0"),
        ({"gpu_memory_utilization": 1e-9}, "below the engine's floor"),
        ({"gpu_memory_utilization": 0.9}, "less than their floors and pins; at most"),
        ({"max_active_seqs": 10**6}, "not within 1 to"),
        ({"colour": "red"}, "not permitted"),
    ],
)
async def test_a_pin_that_cannot_be_changes_nothing(served: Served, body: dict[str, Any], says: str) -> None:
    answer = await served.client.put("/control/pins/solver", json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert (await served.client.get("/control")).json()["pinned"] == {}


async def test_there_is_no_such_engine(served: Served) -> None:
    for method in ("PUT", "DELETE"):
        answer = await served.client.request(method, "/control/pins/nobody", json={})
        assert (answer.status_code, "the engines are planner, solver" in answer.text) == (404, True)


async def test_the_policy_changes_and_the_controller_pauses(served: Served) -> None:
    changed = await served.client.patch("/control", json={"policy": {"name": "static"}, "paused": True})
    assert (changed.json()["policy"], changed.json()["paused"]) == ("static", True)
    wrong = await served.client.patch("/control", json={"policy": {"name": "statik"}, "paused": False})
    assert (wrong.status_code, "static" in wrong.text) == (400, True)
    wrong = await served.client.patch("/control", json={"policy": {"name": "waterfill", "damp": 1}})
    assert (wrong.status_code, "damping" in wrong.text) == (400, True)
    now = (await served.client.get("/control")).json()
    assert (now["policy"], now["paused"]) == ("static", True)


async def test_decisions_come_with_their_reasons(start: Start) -> None:
    served = await start(time_scale=1)
    async with asyncio.timeout(60):
        while not (decisions := (await served.client.get("/control/decisions")).json()):
            await served.client.post("/jobs", json={"problem": PROBLEM})
    assert decisions[0]["policy"] == "waterfill"
    assert all(engine["reason"] for engine in decisions[0]["engines"].values())


async def test_metrics_are_what_prometheus_reads(served: Served) -> None:
    job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
    await served.client.get(f"/jobs/{job}/result", params={"wait_s": 10})
    body = {"model": "solver", "messages": [{"role": "user", "content": "x"}]}
    await served.client.post("/v1/chat/completions", json=body)
    answer = await served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["troupe:jobs", "done"] == 1
    assert found["vllm:generation_tokens_total", "solver"] > 0
    assert found["vllm:time_to_first_token_seconds_count", "solver"] == 5  # four of the job, and one beside it
    assert found["vllm:num_requests_running", "planner"] == 0
    assert found["troupe:engine_up", "critic"] == 1


async def test_the_live_stream_begins_with_what_was(served: Served) -> None:
    async with asyncio.timeout(60):
        while not served.backend.status.samples:
            await served.backend.status.news()
    kinds = []
    async with served.client.stream("GET", "/live") as answer:
        kind = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            if line.startswith("data: "):
                data = json.loads(line[6:])
                kinds.append(kind)
                if kind == "history":
                    assert data["team"] == {"planner": "planner", "solver": "solver", "critic": "critic"}
                    assert data["samples"][0]["engines"]["solver"]["share"] > 0
                if kind == "sample" and data["sample"]:
                    break
    assert kinds[0] == "history"


async def test_the_page_and_all_it_needs_is_here(served: Served) -> None:
    page = await served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("<!doctype", "")  # nothing from elsewhere
    for part in ("app.js", "style.css", "uPlot.iife.min.js", "uPlot.min.css"):
        assert (await served.client.get(f"/page/{part}")).status_code == 200, part
