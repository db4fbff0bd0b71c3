"""Routes for jobs and their events."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.runtime.api.http.conftest import PROBLEM, Served, Start


async def events(served: Served, path: str, until: str | None = None, **headers: str) -> list[dict[str, Any]]:
    """Return a stream's events, up to its end or the first event of the kind `until`."""
    async with served.client.stream("GET", path, headers=headers) as response:
        return await read(response, until)


async def read(response: httpx.Response, until: str | None = None) -> list[dict[str, Any]]:
    """Return an open stream's events, up to its end or the first event of the kind `until`."""
    assert response.status_code == 200, await response.aread()
    assert response.headers["content-type"].startswith("text/event-stream")
    received = []
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            received.append(json.loads(line[6:]))
            if received[-1].get("kind") == until:
                break
    return received


async def submit(served: Served, problem: str = PROBLEM) -> str:
    """Submit a job and return its id."""
    job: str = (await served.client.post("/jobs", json={"problem": problem})).json()["id"]
    return job


async def test_job_is_accepted_solved_and_listed(served: Served) -> None:
    submitted = await served.client.post("/jobs", json={"problem": PROBLEM, "expected": "17"})
    assert submitted.status_code == 202
    job = submitted.json()
    assert submitted.headers["location"] == f"/jobs/{job['id']}"
    assert (job["state"], job["problem"], job["result"]) == ("queued", PROBLEM, None)
    ended = await served.client.get(f"/jobs/{job['id']}/result", params={"wait_s": 10})
    assert ended.status_code == 200
    assert (ended.json()["state"], ended.json()["result"]["answer"]) == ("done", "17")
    assert (await served.client.get(f"/jobs/{job['id']}")).json() == ended.json()
    page = (await served.client.get("/jobs", params={"state": "done"})).json()
    assert ([listed["id"] for listed in page["jobs"]], page["next"]) == ([job["id"]], None)
    cancelled = await served.client.post(f"/jobs/{job['id']}/cancel")
    assert cancelled.json()["state"] == "done"


async def test_the_comparison_decides_whether_the_answer_is_correct(served: Served) -> None:
    correct = {}
    for compare, expected in ((None, "17.0"), ("exact", "17.0"), ("regex", "^1[67]$")):
        body = {"problem": PROBLEM, "expected": expected, "compare": compare}
        job = (await served.client.post("/jobs", json=body)).json()
        assert job["compare"] == compare
        ended = (await served.client.get(f"/jobs/{job['id']}/result", params={"wait_s": 10})).json()
        correct[compare] = ended["result"]["correct"]
        assert ended["result"].get("compare") == compare
    assert correct == {None: True, "exact": False, "regex": True}


async def test_submissions_with_one_idempotency_key_are_one_job(served: Served) -> None:
    body = {"problem": PROBLEM, "idempotency_key": "k"}
    first, second = [await served.client.post("/jobs", json=body) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["id"] == second.json()["id"]
    for change in ({"problem": "1+1"}, {"expected": "17", "compare": "exact"}):
        other = await served.client.post("/jobs", json={**body, **change})
        assert other.status_code == 400
        assert other.json()["error"]["param"] == "idempotency_key"


async def test_pages_list_every_job_once(served: Served) -> None:
    ids = [await submit(served, "1+1") for _ in range(5)]
    seen: list[str] = []
    before = None
    while True:
        page = (await served.client.get("/jobs", params={"limit": 2, **({"before": before} if before else {})})).json()
        seen += [job["id"] for job in page["jobs"]]
        before = page["next"]
        if before is None:
            break
    assert seen == ids[::-1]


async def test_event_stream_resumes_after_the_last_event_id(served: Served) -> None:
    job = await submit(served)
    all_events = await events(served, f"/jobs/{job}/events")
    assert [event["kind"] for event in all_events] == ["queued", "running", *["replied"] * 9, "done"]
    assert all_events[2]["entries"][0]["role"] == "planner"
    rest = await events(served, f"/jobs/{job}/events", **{"Last-Event-ID": str(all_events[4]["id"])})
    assert rest == all_events[5:]
    assert await events(served, f"/jobs/{job}/events?after={all_events[-1]['id']}") == []
    assert await events(served, "/events?after=0", until="done") == all_events


async def test_stream_of_all_events_starts_with_new_events(served: Served) -> None:
    first = await submit(served, "1+1")
    await served.client.get(f"/jobs/{first}/result", params={"wait_s": 10})
    async with served.client.stream("GET", "/events") as response:  # entered once the headers have arrived
        second = await submit(served, "2+2")
        assert {event["job"] for event in await read(response, until="done")} == {second}


async def test_running_job_is_cancelled(start: Start) -> None:
    served = await start(time_scale=20)
    job = await submit(served)
    await events(served, f"/jobs/{job}/events", until="running")
    waited = await served.client.get(f"/jobs/{job}/result", params={"wait_s": 0.1})
    assert (waited.status_code, waited.json()["state"]) == (202, "running")
    assert (await served.client.post(f"/jobs/{job}/cancel")).json()["state"] == "cancelled"
    assert [event["kind"] for event in await events(served, f"/jobs/{job}/events")][-1] == "cancelled"


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "problem", "required"),
        ({"problem": ""}, "problem", "at least 1"),
        ({"problem": 3}, "problem", "string"),
        ({"problem": "1+1", "priority": 0}, "priority", "greater than or equal to 1"),
        ({"problem": "1+1", "deadline_s": -1}, "deadline_s", "greater than 0"),
        (
            {"problem": "1+1", "expected": "2", "compare": "same"},
            "compare",
            "'exact', 'number', 'contains', 'regex' or 'judge'",
        ),
        ({"problem": "1+1", "expected": "(", "compare": "regex"}, "compare", "unclosed group"),
        ({"problem": "1+1", "compare": "exact"}, "compare", "no expected answer"),
        ({"problem": "1+1", "colour": "red"}, "colour", "not permitted"),
        ({"problem": "1000+1"}, None, "999"),
        ([], None, "dictionary"),
    ],
)
async def test_invalid_submission_names_the_field(
    served: Served, body: object, field: str | None, message: str
) -> None:
    response = await served.client.post("/jobs", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (field, 400, "invalid_request_error")
    assert message in error["message"]
    assert (await served.client.get("/jobs")).json()["jobs"] == []


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 5000, b'{"problem": "\\ud800"}', b"NaN"])
async def test_invalid_json_is_a_client_error(served: Served, body: bytes) -> None:
    response = await served.client.post("/jobs", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/jobs/none", "/jobs/none/result", "/jobs/none/events", "/nowhere"])
async def test_unknown_job_or_path_is_not_found(served: Served, path: str) -> None:
    response = await served.client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, 404)


async def test_a_deadline_before_the_first_engine_wakes_is_refused_with_the_time_to_wait(served: Served) -> None:
    orchestrator = served.backend.ready_team().orchestrator
    served.backend.jobs.use(orchestrator, lambda: 2.3)
    refused = await served.client.post("/jobs", json={"problem": PROBLEM, "deadline_s": 2})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
    assert refused.json()["error"]["message"].startswith("deadline_s: the first engine wakes in 2.3 s")
    assert (await served.client.post("/jobs", json={"problem": PROBLEM, "deadline_s": 60})).status_code == 202


async def test_full_queue_rejects_jobs(start: Start) -> None:
    served = await start(time_scale=20, jobs_at_once=1, queue_max=2)
    responses = [await served.client.post("/jobs", json={"problem": PROBLEM}) for _ in range(4)]
    assert [response.status_code for response in responses] == [202, 202, 202, 503]
    assert "try again later" in responses[-1].json()["error"]["message"]
    assert responses[-1].headers["retry-after"] == "1"


async def test_disconnected_event_readers_leave_no_tasks(start: Start) -> None:
    served = await start(time_scale=1)
    before = len(asyncio.all_tasks())
    for _ in range(20):
        async with served.client.stream("GET", "/events") as response:
            assert response.status_code == 200
    async with asyncio.timeout(60):
        while len(asyncio.all_tasks()) > before + 2:  # noqa: ASYNC110  there is no event for this
            await asyncio.sleep(0.05)
    assert not served.backend.jobs.events._job_readers
