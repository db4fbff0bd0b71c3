"""What the routes stand on: the jobs, and the engines once they are up."""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from runtime.config import Config
from runtime.engines.base import Chunk, EngineHandle, GenerateRequest
from runtime.errors import Busy
from runtime.jobs.service import JobService
from runtime.jobs.team import Team
from runtime.server.metrics import Metrics
from runtime.session import Crew
from runtime.status import Status


@dataclass
class Backend:
    """The parts of a running service. `crew` is None until its engines are up."""

    config: Config
    team: Team
    jobs: JobService
    status: Status
    metrics: Metrics
    crew: Crew | None = None

    @property
    def unready(self) -> str | None:
        """Why work cannot be done now; None when it can."""
        if self.jobs.draining:
            return "the service is ending"
        if self.crew is None:
            states = ", ".join(f"{name} {state}" for name, state in self.status.states.items())
            return f"the engines are starting ({states})" if states else "the engines are starting"
        return self.jobs.journal.fault

    @property
    def running(self) -> Crew:
        """The engines and who moves memory between them. Raises Busy where they are not up."""
        if self.crew is None or self.jobs.draining:
            raise Busy(f"{self.unready}; try again later")
        return self.crew

    @property
    def engines(self) -> Mapping[str, EngineHandle]:
        """The engines that are up."""
        return self.crew.engines if self.crew else {}

    async def generate(self, seat: str, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """One request to the engine that serves a seat. Raises Busy, EngineError."""
        engine = self.team.seats[seat].engine
        with self.metrics.request(engine) as timed:
            async with aclosing(self.running.generate(engine, request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    timed.chunk(chunk)
                    yield chunk


def _backend(request: Request) -> Backend:
    found: Backend = request.app.state.backend
    return found


Backing = Annotated[Backend, Depends(_backend)]
"""What a route stands on."""
