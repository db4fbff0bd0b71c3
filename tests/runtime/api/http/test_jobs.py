"""Jobs over HTTP, on a real port."""

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.api.serve import serving
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team
from tests.runtime.api.http.conftest import PROBLEM, Served, Start, configured, service


async def events(served: Served, path: str, until: str | None = None, **headers: str) -> list[dict[str, Any]]:
    """The events of a stream, to its end or the first of a kind."""
    async with served.client.stream("GET", path, headers=headers) as answer:
        return await read(answer, until)


async def read(answer: httpx.Response, until: str | None = None) -> list[dict[str, Any]]:
    """Read the events of an open stream, to its end or the first of a kind."""
    assert answer.status_code == 200, await answer.aread()
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            found.append(json.loads(line[6:]))
            if found[-1].get("kind") == until:
                break
    return found


async def test_a_job_goes_its_way(served: Served) -> None:
    submitted = await served.client.post("/jobs", json={"problem": PROBLEM, "expected": "17"})
    assert submitted.status_code == 202
    job = submitted.json()
    assert submitted.headers["location"] == f"/jobs/{job['id']}"
    assert (job["state"], job["problem"], job["result"]) == ("queued", PROBLEM, None)
    ended = await served.client.get(f"/jobs/{job['id']}/result", params={"wait_s": 10})
    assert ended.status_code == 200
    assert (ended.json()["state"], ended.json()["result"]["answer"]) == ("done", "17")
    assert (await served.client.get(f"/jobs/{job['id']}")).json() == ended.json()
    listed = (await served.client.get("/jobs", params={"state": "done"})).json()
    assert ([one["id"] for one in listed["jobs"]], listed["next"]) == ([job["id"]], None)
    cancelled = await served.client.post(f"/jobs/{job['id']}/cancel")
    assert cancelled.json()["state"] == "done"


async def test_a_key_is_one_job(served: Served) -> None:
    body = {"problem": PROBLEM, "idempotency_key": "k"}
    first, second = [await served.client.post("/jobs", json=body) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["id"] == second.json()["id"]
    other = await served.client.post("/jobs", json={**body, "problem": "1+1"})
    assert other.status_code == 400
    assert other.json()["error"]["param"] == "idempotency_key"


async def test_pages_job_readers_follow_one_another(served: Served) -> None:
    ids = [(await served.client.post("/jobs", json={"problem": "1+1"})).json()["id"] for _ in range(5)]
    seen: list[str] = []
    before = None
    while True:
        page = (await served.client.get("/jobs", params={"limit": 2, **({"before": before} if before else {})})).json()
        seen += [job["id"] for job in page["jobs"]]
        before = page["next"]
        if before is None:
            break
    assert seen == ids[::-1]


async def test_events_go_on_from_the_last_one_seen(served: Served) -> None:
    job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
    all_events = await events(served, f"/jobs/{job}/events")
    assert [event["kind"] for event in all_events] == ["queued", "running", *["replied"] * 9, "done"]
    assert all_events[2]["entries"][0]["role"] == "planner"
    rest = await events(served, f"/jobs/{job}/events", **{"Last-Event-ID": str(all_events[4]["id"])})
    assert rest == all_events[5:]
    assert await events(served, f"/jobs/{job}/events?after={all_events[-1]['id']}") == []
    of_all = await events(served, "/events?after=0", until="done")
    assert of_all == all_events


async def test_a_stream_of_all_begins_with_what_is_new(served: Served) -> None:
    first = (await served.client.post("/jobs", json={"problem": "1+1"})).json()["id"]
    await served.client.get(f"/jobs/{first}/result", params={"wait_s": 10})
    async with served.client.stream("GET", "/events") as answer:  # its headers say that it has begun
        second = (await served.client.post("/jobs", json={"problem": "2+2"})).json()["id"]
        assert {event["job"] for event in await read(answer, until="done")} == {second}


async def test_a_running_job_is_cancelled(start: Start) -> None:
    served = await start(time_scale=20)
    job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
    await events(served, f"/jobs/{job}/events", until="running")
    waited = await served.client.get(f"/jobs/{job}/result", params={"wait_s": 0.1})
    assert (waited.status_code, waited.json()["state"]) == (202, "running")
    assert (await served.client.post(f"/jobs/{job}/cancel")).json()["state"] == "cancelled"
    assert [event["kind"] for event in await events(served, f"/jobs/{job}/events")][-1] == "cancelled"


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "problem", "required"),
        ({"problem": ""}, "problem", "at least 1"),
        ({"problem": 3}, "problem", "string"),
        ({"problem": "1+1", "priority": 0}, "priority", "greater than or equal to 1"),
        ({"problem": "1+1", "deadline_s": -1}, "deadline_s", "greater than 0"),
        ({"problem": "1+1", "colour": "red"}, "colour", "not permitted"),
        ({"problem": "1000+1"}, None, "999"),
        ([], None, "dictionary"),
    ],
)
async def test_bad_submissions_name_the_field(served: Served, body: object, field: str | None, says: str) -> None:
    answer = await served.client.post("/jobs", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (field, 400, "invalid_request_error")
    assert says in error["message"]
    assert (await served.client.get("/jobs")).json()["jobs"] == []


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 5000, b'{"problem": "\\ud800"}', b"NaN"])
async def test_what_is_no_json_is_no_fault_of_ours(served: Served, body: bytes) -> None:
    answer = await served.client.post("/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/jobs/none", "/jobs/none/result", "/jobs/none/events", "/nowhere"])
async def test_what_there_is_not_is_not_found(served: Served, path: str) -> None:
    answer = await served.client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


async def test_a_full_queue_is_told(start: Start) -> None:
    served = await start(time_scale=20, jobs_at_once=1, queue_max=2)
    answers = [await served.client.post("/jobs", json={"problem": PROBLEM}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [202, 202, 202, 503]
    assert "try again later" in answers[-1].json()["error"]["message"]
    assert answers[-1].headers["retry-after"] == "1"


async def test_readers_that_vanish_leave_nothing(start: Start) -> None:
    served = await start(time_scale=1)
    before = len(asyncio.all_tasks())
    for _ in range(20):
        async with served.client.stream("GET", "/events") as answer:
            assert answer.status_code == 200
    async with asyncio.timeout(60):
        while len(asyncio.all_tasks()) > before + 2:  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.05)
    assert not served.backend.jobs.feed._job_readers


async def test_what_is_left_goes_on_with_the_next_start(tmp_path: Path) -> None:
    chosen = configured(tmp_path)
    async with service(chosen, time_scale=20) as served:
        job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
        await events(served, f"/jobs/{job}/events", until="replied")
    async with service(chosen) as served:
        ended = (await served.client.get(f"/jobs/{job}/result", params={"wait_s": 10})).json()
        assert (ended["state"], ended["result"]["answer"], ended["attempts"]) == ("done", "17", 2)


async def test_jobs_are_accepted_while_engines_start(tmp_path: Path) -> None:
    """And health is answered, while readiness says what is missing."""
    chosen = configured(tmp_path)
    team = assemble(chosen)
    go = asyncio.Event()
    where: asyncio.Queue[str] = asyncio.Queue()

    @asynccontextmanager
    async def slow(listener, publish):  # type: ignore[no-untyped-def]
        await go.wait()
        async with start_modelled_team(chosen, team, listener, publish, time_scale=0) as crew:
            yield crew

    async def serve() -> None:
        async with serving(chosen, team, slow, where.put_nowait):
            await asyncio.sleep(60)

    task = asyncio.create_task(serve())
    try:
        async with httpx.AsyncClient(base_url=await where.get(), timeout=60) as client:
            assert (await client.get("/health")).status_code == 200
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "the engines are starting")
            job = (await client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
            role = await client.post(
                "/v1/chat/completions", json={"model": "solver", "messages": [{"role": "user", "content": "x"}]}
            )
            assert role.status_code == 503
            go.set()
            ended = await client.get(f"/jobs/{job}/result", params={"wait_s": 10})
            assert ended.json()["state"] == "done"
            assert (await client.get("/ready")).status_code == 200
    finally:
        task.cancel()
        await asyncio.wait([task])
