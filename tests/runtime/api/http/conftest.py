"""A service on a real port, with a real journal, over modelled engines."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
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
async def service(chosen: Config, time_scale: float = 0, **options: Any) -> AsyncIterator[Served]:
    """Run a service. Its engines take `time_scale` times as long as the real ones that they model."""
    urls: list[str] = []
    team = assemble(chosen)
    open_team = partial(start_modelled_team, chosen, team, time_scale=time_scale)
    async with (
        serving(chosen, team, open_team, urls.append, **options) as backend,
        httpx.AsyncClient(base_url=urls[0], timeout=60) as client,
    ):
        yield Served(backend, client, urls[0])


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """A function that starts services; they stop when the test ends."""
    async with AsyncExitStack() as owned:

        async def start_service(time_scale: float = 0, **settings: Any) -> Served:
            return await owned.enter_async_context(service(configured(tmp_path, **settings), time_scale))

        yield start_service


@pytest.fixture
async def served(start: Start) -> Served:
    return await start()


def user_message(text: str) -> list[Any]:
    """Return the messages of a chat with one user message."""
    return [{"role": "user", "content": text}]
