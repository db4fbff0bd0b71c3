"""Pages of other sites cannot change anything through any route; clients that are not browsers are unaffected."""

import json
from typing import Any

import httpx
import pytest
from playwright.async_api import async_playwright, expect

from runtime.api.http.cross_site import SAFE_METHODS
from tests.programs import CHROMIUM, needs
from tests.runtime.api.http.conftest import PROBLEM, Served, Start, user_message

BODIES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("POST", "/jobs"): {"problem": PROBLEM},
    ("POST", "/jobs/{id}/cancel"): None,
    ("POST", "/v1/chat/completions"): {"model": "solver", "messages": user_message("some words")},
    ("POST", "/v1/completions"): {"model": "solver", "prompt": "some words"},
    ("POST", "/v1/responses"): {"model": "solver", "input": "some words"},
    ("POST", "/v1/messages"): {"model": "solver", "max_tokens": 5, "messages": user_message("some words")},
    ("POST", "/v1/messages/count_tokens"): {"model": "solver", "messages": user_message("some words")},
    ("POST", "/tokenize"): {"model": "solver", "prompt": "some words"},
    ("POST", "/detokenize"): {"model": "solver", "tokens": [1]},
    ("PATCH", "/control"): {"paused": True},
    ("PUT", "/control/pins/{engine}"): {},
    ("DELETE", "/control/pins/{engine}"): None,
}
"""A valid body for every route that changes something."""
CROSS_SITE_HEADERS = {
    "origin-of-another-site": {"Origin": "https://evil.example"},
    "null-origin": {"Origin": "null"},
    "origin-of-another-port": {"Origin": "http://localhost:1"},
    "fetch-site-cross-site": {"Sec-Fetch-Site": "cross-site"},
    "fetch-site-same-site": {"Sec-Fetch-Site": "same-site"},
}
"""What browsers send; `same-site` is another port of this machine."""


async def unsafe_routes(served: Served) -> set[tuple[str, str]]:
    document = (await served.client.get("/openapi.json", timeout=600)).json()
    methods = ((method.upper(), path) for path, methods in document["paths"].items() for method in methods)
    return {(method, path) for method, path in methods if method not in SAFE_METHODS}


async def state(served: Served) -> tuple[Any, ...]:
    """Return everything that the routes could change."""
    jobs, control = [(await served.client.get(path)).json() for path in ("/jobs", "/control")]
    states = [(job["id"], job["state"] == "cancelled") for job in jobs["jobs"]]
    requests = served.backend.engines["solver"].stats().requests
    return states, control["paused"], list(control["pinned"]), requests


@pytest.fixture
async def served(start: Start) -> Served:
    """A service whose only job runs longer than the test, and whose planner is pinned."""
    served = await start(time_scale=1000)
    await served.client.put("/control/pins/planner", json={})
    await served.client.post("/jobs", json={"problem": PROBLEM})
    return served


async def changing_requests(served: Served) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Return a request for every unsafe route that would change something if the service's own page sent it."""
    assert set(BODIES) == await unsafe_routes(served)
    job = (await served.client.get("/jobs")).json()["jobs"][0]["id"]
    engine = {"PUT": "critic", "DELETE": "planner"}
    return [(method, path.format(id=job, engine=engine.get(method)), body) for (method, path), body in BODIES.items()]


@pytest.mark.parametrize("headers", CROSS_SITE_HEADERS.values(), ids=CROSS_SITE_HEADERS.keys())
async def test_cross_site_requests_change_nothing(served: Served, headers: dict[str, str]) -> None:
    before = await state(served)
    for method, path, body in await changing_requests(served):
        response = await served.client.request(method, path, headers=headers, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (403, 403), path
        assert "another site" in response.json()["error"]["message"]
    assert await state(served) == before


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
async def test_json_needs_the_json_content_type(served: Served, content_type: str | None) -> None:
    """An HTML form can send these types; an old browser sends no header that tells its origin."""
    before = await state(served)
    headers = {"Content-Type": content_type} if content_type else {}
    for method, path, body in await changing_requests(served):
        if body is not None:
            response = await served.client.request(method, path, headers=headers, content=json.dumps(body).encode())
            assert response.status_code == 400, path
    assert await state(served) == before


async def test_own_page_may_change_things(served: Served) -> None:
    for headers in ({"Origin": served.url}, {"Sec-Fetch-Site": "same-origin", "Origin": served.url}):
        response = await served.client.patch("/control", headers=headers, json={"paused": True})
        assert response.status_code == 200, headers


async def test_other_clients_need_neither_origin_nor_body(served: Served) -> None:
    """Requests as `curl -X POST` and `curl -d ''` send them."""
    job = (await served.client.get("/jobs")).json()["jobs"][0]["id"]
    async with httpx.AsyncClient(base_url=served.url, headers={"User-Agent": "curl/8.5.0"}) as curl:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await curl.post(f"/jobs/{job}/cancel", headers=form)).json()["state"] == "cancelled"
        assert (await curl.delete("/control/pins/planner")).json()["pinned"] == {}


async def test_responses_allow_no_other_origin_to_read_them(served: Served) -> None:
    response = await served.client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


@needs(CHROMIUM, "Chromium")
async def test_form_of_another_origin_in_a_browser_cancels_nothing(served: Served) -> None:
    before = await state(served)
    job = before[0][0][0]
    other = served.url.replace("127.0.0.1", "localhost")  # another site to the browser, but a host that we answer to
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        await page.goto(f"{other}/health")
        await page.set_content(f"<form method=post action={served.url}/jobs/{job}/cancel><button>win</button></form>")
        await page.get_by_role("button").click()
        await expect(page.locator("body")).to_contain_text("another site")
        await browser.close()
    assert await state(served) == before
