"""A service on a real port over modelled engines, with a real journal."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime import config
from runtime.api.http.backend import Backend
from runtime.api.serve import serving
from runtime.config import Config
from runtime.jobs.team import assemble
from runtime.simulation.assembly import start_modelled_team

PROBLEM = "(12+7)*3-(45-5)"


@dataclass
class Served:
    """A service that is up, a client for it, and where it listens."""

    backend: Backend
    client: httpx.AsyncClient
    url: str


Start = Callable[..., Awaitable[Served]]


def configured(folder: Path, **service: Any) -> Config:
    chosen = config.load("embedded")
    places = {"port": 0, "journal": str(folder / "jobs.db"), "tokens": str(folder / "tokens.json")}
    return chosen.model_copy(update={"service": chosen.service.model_copy(update={**places, **service})})


@asynccontextmanager
async def service(chosen: Config, time_scale: float = 0, **options: Any) -> AsyncIterator[Served]:
    where: list[str] = []
    team = assemble(chosen)
    opening = partial(start_modelled_team, chosen, team, time_scale=time_scale)
    async with (
        serving(chosen, team, opening, where.append, **options) as backend,
        httpx.AsyncClient(base_url=where[0], timeout=60) as client,
    ):
        yield Served(backend, client, where[0])


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts services, which end with the test."""
    async with AsyncExitStack() as owned:

        async def begin(time_scale: float = 0, **settings: Any) -> Served:
            return await owned.enter_async_context(service(configured(tmp_path, **settings), time_scale))

        yield begin


@pytest.fixture
async def served(start: Start) -> Served:
    return await start()
