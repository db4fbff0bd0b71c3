"""The service as a whole: its start and its restart."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from runtime.api.serve import serving
from runtime.assembly import RunningTeam
from runtime.devices.handle import Publish
from runtime.events import Listener
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team
from tests.runtime.api.http.conftest import PROBLEM, Served, configured, service, user_message


async def wait_for_reply(served: Served, job: str) -> None:
    """Return once a role has replied in a job."""
    async with served.client.stream("GET", f"/jobs/{job}/events") as response:
        async for line in response.aiter_lines():
            if line.startswith("data: ") and json.loads(line[6:])["kind"] == "replied":
                return


async def test_restart_resumes_an_unfinished_job(tmp_path: Path) -> None:
    chosen = configured(tmp_path)
    async with service(chosen, time_scale=20) as served:
        job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
        await wait_for_reply(served, job)
    async with service(chosen) as served:
        ended = (await served.client.get(f"/jobs/{job}/result", params={"wait_s": 10})).json()
        assert (ended["state"], ended["result"]["answer"], ended["attempts"]) == ("done", "17", 2)


async def test_jobs_are_accepted_while_engines_start(tmp_path: Path) -> None:
    chosen = configured(tmp_path)
    team = assemble(chosen)
    may_start = asyncio.Event()
    urls: asyncio.Queue[str] = asyncio.Queue()

    @asynccontextmanager
    async def start_late(listener: Listener, publish: Publish) -> AsyncIterator[RunningTeam]:
        await may_start.wait()
        async with start_modelled_team(chosen, team, listener, publish, time_scale=0) as running_team:
            yield running_team

    async def serve() -> None:
        async with serving(chosen, team, start_late, urls.put_nowait):
            await asyncio.sleep(60)

    task = asyncio.create_task(serve())
    try:
        async with httpx.AsyncClient(base_url=await urls.get(), timeout=60) as client:
            assert (await client.get("/health")).status_code == 200
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "the engines are starting")
            job = (await client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
            chat = await client.post("/v1/chat/completions", json={"model": "solver", "messages": user_message("x")})
            assert chat.status_code == 503
            may_start.set()
            ended = await client.get(f"/jobs/{job}/result", params={"wait_s": 10})
            assert ended.json()["state"] == "done"
            assert (await client.get("/ready")).status_code == 200
    finally:
        task.cancel()
        await asyncio.wait([task])
