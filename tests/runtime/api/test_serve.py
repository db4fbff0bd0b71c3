"""The service as a whole: its start and its restart."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from runtime import config
from runtime.api.serve import drain, serving
from runtime.assembly import RunningTeam, needed_tools
from runtime.devices.handle import Publish
from runtime.engines.request import GenerateRequest
from runtime.events import Listener
from runtime.jobs.submission import Submission
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team
from runtime.tools.toolbox import Toolbox
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


async def test_stop_interrupts_a_job_without_retries_and_restart_resumes_it(tmp_path: Path) -> None:
    chosen = configured(tmp_path)
    async with service(chosen, time_scale=20) as served:
        job = (await served.client.post("/jobs", json={"problem": PROBLEM, "retries": 0})).json()["id"]
        await wait_for_reply(served, job)
        assert await drain(served.backend, 0.01) == 1
    async with service(chosen) as served:
        ended = (await served.client.get(f"/jobs/{job}/result", params={"wait_s": 10})).json()
        assert (ended["state"], ended["result"]["answer"], ended["attempts"]) == ("done", "17", 2)


TOOL = """
import time
from pathlib import Path
from agents.tool import tool

CALLED = Path(__file__).with_name("called")

@tool(idempotent=True)
def look_up() -> str:
    "Look up a word. The first call never returns."
    if not CALLED.exists():
        CALLED.touch()
        time.sleep(600)
    return "found"
"""
TEAM = """
extends: embedded
team: {solver: {role: role.yaml, engine: solver}}
workflow: {name: solo}
tools: {look_up: {function: "tool.py:look_up"}}
"""
ROLE = """
name: finder
task: answer
prompt: "{problem}"
reply: {type: object, properties: {answer: {type: string, maxLength: 100}}, required: [answer]}
tools: [look_up]
"""


def reply_with_output(request: GenerateRequest) -> str:
    """Reply as a model that calls the tool once and answers with its output."""
    heading, _, output = request.messages[-1].content.partition("\n")
    if "look_up" not in heading:
        return json.dumps({"tool": "look_up", "arguments": {}})
    return json.dumps({"reply": {"answer": output}})


async def test_stop_interrupts_a_tool_call_and_restart_repeats_it(tmp_path: Path) -> None:
    for name, text in (("tool.py", TOOL), ("role.yaml", ROLE), ("team.yaml", TEAM)):
        (tmp_path / name).write_text(text)
    chosen = config.load(str(tmp_path / "team.yaml")).model_copy(update={"service": configured(tmp_path).service})
    team = assemble(chosen)

    @asynccontextmanager
    async def start_with_tools(listener: Listener, publish: Publish) -> AsyncIterator[RunningTeam]:
        async with (
            Toolbox(needed_tools(chosen, team)) as toolbox,
            start_modelled_team(chosen, team, listener, publish, 0, script=reply_with_output) as running_team,
        ):
            running_team.toolbox = toolbox
            running_team.orchestrator = running_team.orchestrate(team)
            yield running_team

    async with serving(chosen, team, start_with_tools) as backend:
        record, _ = await backend.jobs.submit(Submission(problem="Which word?"))
        async with asyncio.timeout(60):
            while not (tmp_path / "called").exists():  # noqa: ASYNC110  another process makes it
                await asyncio.sleep(0.01)
    async with serving(chosen, team, start_with_tools) as backend, asyncio.timeout(60):
        events = [event async for event in backend.jobs.events.follow_job(record.id)]
    assert events[-1].data == {"answer": "found"}
    assert [event.data["output"] for event in events if event.kind == "tool returned"] == ["found"]


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
