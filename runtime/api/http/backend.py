"""What the routes stand on: the jobs, and the engines once they are up."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from runtime.api.http.metrics import Metrics
from runtime.api.monitor import Monitor
from runtime.assembly import RunningTeam
from runtime.config import Config
from runtime.engines.handle import EngineHandle
from runtime.engines.request import Chunk, GenerateRequest
from runtime.errors import Busy
from runtime.jobs.service import JobService
from runtime.jobs.team import Team


@dataclass
class Backend:
    """The parts of a running service. `running_team` is None until its engines are up."""

    config: Config
    team: Team
    jobs: JobService
    status: Monitor
    metrics: Metrics
    running_team: RunningTeam | None = None

    @property
    def unready(self) -> str | None:
        """Why work cannot be done now; None when it can."""
        if self.jobs.draining:
            return "the service is ending"
        if self.running_team is None:
            states = ", ".join(f"{name} {state}" for name, state in self.status.states.items())
            return f"the engines are starting ({states})" if states else "the engines are starting"
        return self.jobs.journal.fault

    @property
    def running(self) -> RunningTeam:
        """The engines and who moves memory between them. Raises Busy where they are not up."""
        if self.running_team is None or self.jobs.draining:
            raise Busy(f"{self.unready}; try again later")
        return self.running_team

    @property
    def engines(self) -> Mapping[str, EngineHandle]:
        """The engines that are up."""
        return self.running_team.engines if self.running_team else {}

    async def generate(self, seat: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """One request to the engine that serves a seat. Raises Busy, EngineError."""
        engine = self.team.seats[seat].engine
        with self.metrics.request(engine) as timed:
            async with aclosing(self.running.generate(engine, request)) as chunks:
                async for chunk in chunks:
                    timed.chunk(chunk)
                    yield chunk


def _backend(request: Request) -> Backend:
    found: Backend = request.app.state.backend
    return found


Backing = Annotated[Backend, Depends(_backend)]
"""What a route stands on."""
