"""A page of another site changes nothing here, by any route; programs that are no browsers are not hindered."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.async_api import async_playwright, expect

from runtime.api.http import limits
from tests.programs import CHROMIUM, needs
from tests.runtime.api.http.conftest import PROBLEM, Served, Start

SAID = [{"role": "user", "content": "some words"}]
BODIES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("POST", "/jobs"): {"problem": PROBLEM},
    ("POST", "/jobs/{id}/cancel"): None,
    ("POST", "/v1/chat/completions"): {"model": "solver", "messages": SAID},
    ("POST", "/v1/completions"): {"model": "solver", "prompt": "some words"},
    ("PATCH", "/control"): {"paused": True},
    ("PUT", "/control/pins/{engine}"): {},
    ("DELETE", "/control/pins/{engine}"): None,
}
"""Every route that changes something, and a body that it takes."""
FOREIGN = {
    "another site, by its origin": {"Origin": "https://evil.example"},
    "a page without an origin": {"Origin": "null"},
    "another port of this machine": {"Origin": "http://localhost:1"},
    "another site, as a browser says": {"Sec-Fetch-Site": "cross-site"},
    "another port, as a browser says": {"Sec-Fetch-Site": "same-site"},
}


async def unsafe_routes(served: Served) -> set[tuple[str, str]]:
    document = (await served.client.get("/openapi.json")).json()
    methods = ((method.upper(), path) for path, methods in document["paths"].items() for method in methods)
    return {(method, path) for method, path in methods if method not in limits.SAFE}


async def state(served: Served) -> tuple[Any, ...]:
    """Everything that the routes could change."""
    jobs, control = [(await served.client.get(path)).json() for path in ("/jobs", "/control")]
    states = [(job["id"], job["state"] == "cancelled") for job in jobs["jobs"]]
    requests = served.backend.engines["solver"].stats().requests
    return states, control["paused"], list(control["pinned"]), requests


@pytest.fixture
async def served(start: Start) -> Served:
    """A service whose one job runs for longer than a test, and whose planner is pinned."""
    served = await start(time_scale=1000)
    await served.client.put("/control/pins/planner", json={})
    await served.client.post("/jobs", json={"problem": PROBLEM})
    return served


async def filled_in(served: Served) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Every route, with a job and an engine that there are; it would change something for the service's own page."""
    assert set(BODIES) == await unsafe_routes(served)
    job = (await served.client.get("/jobs")).json()["jobs"][0]["id"]
    engine = {"PUT": "critic", "DELETE": "planner"}
    return iter([(m, path.format(id=job, engine=engine.get(m)), body) for (m, path), body in BODIES.items()])


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN.keys())
async def test_no_route_does_what_a_page_of_another_site_asks(served: Served, headers: dict[str, str]) -> None:
    before = await state(served)
    for method, path, body in await filled_in(served):
        answer = await served.client.request(method, path, headers=headers, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, 403), path
        assert "another site" in answer.json()["error"]["message"]
    assert await state(served) == before


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
async def test_no_route_takes_json_that_is_not_said_to_be_json(served: Served, content_type: str | None) -> None:
    """What a form can send, from a browser so old that it does not say where from."""
    before = await state(served)
    headers = {"Content-Type": content_type} if content_type else {}
    for method, path, body in await filled_in(served):
        if body is not None:
            answer = await served.client.request(method, path, headers=headers, content=json.dumps(body).encode())
            assert answer.status_code == 400, path
    assert await state(served) == before


async def test_the_page_of_the_service_may_change_things(served: Served) -> None:
    for headers in ({"Origin": served.url}, {"Sec-Fetch-Site": "same-origin", "Origin": served.url}):
        answer = await served.client.patch("/control", headers=headers, json={"paused": True})
        assert answer.status_code == 200, headers


async def test_programs_need_no_origin_and_no_body(served: Served) -> None:
    """As `curl -X POST` asks, and `curl -d ''`."""
    job = (await served.client.get("/jobs")).json()["jobs"][0]["id"]
    async with httpx.AsyncClient(base_url=served.url, headers={"User-Agent": "curl/8.5.0"}) as curl:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await curl.post(f"/jobs/{job}/cancel", headers=form)).json()["state"] == "cancelled"
        assert (await curl.delete("/control/pins/planner")).json()["pinned"] == {}


@needs(CHROMIUM, "Chromium")
async def test_a_form_of_another_origin_in_a_real_browser_cancels_nothing(served: Served) -> None:
    before = await state(served)
    job = before[0][0][0]
    other = served.url.replace("127.0.0.1", "localhost")  # another site for the browser, and a name that we answer to
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        await page.goto(f"{other}/health")
        await page.set_content(f"<form method=post action={served.url}/jobs/{job}/cancel><button>win</button></form>")
        await page.get_by_role("button").click()
        await expect(page.locator("body")).to_contain_text("another site")
        await browser.close()
    assert await state(served) == before
