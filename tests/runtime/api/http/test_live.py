"""The live page's files and the event stream that it draws."""

import asyncio
import json

from tests.runtime.api.http.conftest import Served


async def test_stream_starts_with_the_history(served: Served) -> None:
    async with asyncio.timeout(60):
        while not served.backend.monitor.samples:
            await served.backend.monitor.wait_for_change()
    kinds = []
    async with served.client.stream("GET", "/live") as response:
        kind = ""
        async for line in response.aiter_lines():
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


async def test_page_loads_nothing_from_other_sites(served: Served) -> None:
    page = await served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("<!doctype", "")
    for part in ("app.js", "style.css", "uPlot.iife.min.js", "uPlot.min.css"):
        assert (await served.client.get(f"/page/{part}")).status_code == 200, part
