"""A service on a real port, with a real journal, over modelled engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime import config
from runtime.api.http.backend import Backend
from runtime.api.serve import serving
from runtime.config import Config
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.policy import Decision, Policy
from runtime.control.snapshot import Snapshot
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team

PROBLEM = "(12+7)*3-(45-5)"


@dataclass
class Served:
    """A running service: its parts, a client for it, and its URL."""

    backend: Backend
    client: httpx.AsyncClient
    url: str

    def openai_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


Start = Callable[..., Awaitable[Served]]


def configured(folder: Path, **service: Any) -> Config:
    """Return the embedded configuration with its files in a folder, a free port, and these settings of the service."""
    embedded = config.load("embedded")
    places = {"port": 0, "journal": str(folder / "jobs.db"), "tokens": str(folder / "tokens.json")}
    return embedded.model_copy(update={"service": embedded.service.model_copy(update={**places, **service})})


@asynccontextmanager
async def service(chosen: Config, time_scale: float = 0, devices: int = 1, **options: Any) -> AsyncIterator[Served]:
    """Run a service. Its engines take `time_scale` times as long as the real ones that they model."""
    urls: list[str] = []
    team = assemble(chosen)
    open_team = partial(start_modelled_team, chosen, team, time_scale=time_scale, devices=devices)
    async with (
        serving(chosen, team, open_team, urls.append, **options) as backend,
        httpx.AsyncClient(base_url=urls[0], timeout=60) as client,
    ):
        yield Served(backend, client, urls[0])


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """A function that starts services; they stop when the test ends."""
    async with AsyncExitStack() as owned:

        async def start_service(time_scale: float = 0, devices: int = 1, **settings: Any) -> Served:
            return await owned.enter_async_context(service(configured(tmp_path, **settings), time_scale, devices))

        yield start_service


@pytest.fixture
async def served(start: Start) -> Served:
    return await start()


class Pausing(Policy):
    """A policy that pauses the admission of the engine `solver`."""

    def __init__(self) -> None:
        super().__init__(self.Options())

    def decide(self, snapshot: Snapshot) -> Decision:
        solver = snapshot.engines["solver"]
        grants = {name: view.grant for name, view in snapshot.engines.items()}
        grants["solver"] = replace(solver.grant, max_active_seqs=0)
        return Decision(grants, dict.fromkeys(grants, "solver must wait"))


async def pause_solver(served: Served) -> None:
    """Work a job, so that costs are measured, then pause the solver's admission. Return once the controller sees it."""
    job = (await served.client.post("/jobs", json={"problem": PROBLEM})).json()["id"]
    await served.client.get(f"/jobs/{job}/result", params={"wait_s": 60})
    controller = served.backend.ready_team().devices["0"].controller
    controller.use(ContainedPolicy("pausing", Pausing()))
    async with asyncio.timeout(60):
        while controller.snapshot is None or controller.snapshot.engines["solver"].paused_s < 0.1:  # noqa: ASYNC110  no event
            await asyncio.sleep(0.02)


def user_message(text: str) -> list[Any]:
    """Return the messages of a chat with one user message."""
    return [{"role": "user", "content": text}]
