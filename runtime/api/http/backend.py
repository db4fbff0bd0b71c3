"""The parts of a running service that routes use, as a FastAPI dependency."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from runtime.api.http.metrics import Metrics
from runtime.api.monitor import Monitor
from runtime.assembly import RunningTeam
from runtime.config import Config
from runtime.control.snapshot import Snapshot
from runtime.engines.handle import EngineHandle
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.vllm_import import import_with_vllm
from runtime.errors import Busy
from runtime.jobs.service import JobService
from runtime.jobs.team import Team

if TYPE_CHECKING:
    from runtime.api.http.vllm_serving import EngineFront, SeatModel


@dataclass
class Backend:
    """The parts of a running service. `running_team` is None while the engines start or stop."""

    config: Config
    team: Team
    jobs: JobService
    monitor: Monitor
    metrics: Metrics
    running_team: RunningTeam | None = None
    _fronts: "dict[str, EngineFront]" = field(default_factory=dict, init=False)
    _seat_models: "dict[str, SeatModel]" = field(default_factory=dict, init=False)
    _making: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def why_not_ready(self) -> str | None:
        """Return why the service cannot run work now, or None if it can."""
        if self.jobs.draining:
            return "the service is shutting down"
        if self.running_team is None:
            states = ", ".join(f"{name} {state}" for name, state in self.monitor.states.items())
            return f"the engines are starting ({states})" if states else "the engines are starting"
        return self.jobs.journal.fault

    def ready_team(self) -> RunningTeam:
        """Return the running team. Raises Busy while the engines start, and once the service shuts down."""
        if self.running_team is None or self.jobs.draining:
            raise Busy(f"{self.why_not_ready()}; try again later")
        return self.running_team

    @property
    def engines(self) -> Mapping[str, EngineHandle]:
        """The running engines by the name of the replica; empty while they start or stop."""
        return self.running_team.engines if self.running_team else {}

    @property
    def snapshots(self) -> Mapping[str, Snapshot]:
        """The newest snapshot of each device; a device whose controller has taken none is left out."""
        return self.running_team.controllers.snapshots if self.running_team else {}

    async def seat_model(self, seat: str) -> "SeatModel":
        """Return the model of a seat. The first call for an engine imports vLLM and reads the model's tokenizer.

        Raises Busy until the engines have started.
        """
        self.ready_team()
        if seat not in self._seat_models:
            async with self._making:
                await asyncio.to_thread(self._make_seat_model, seat)
        return self._seat_models[seat]

    def _make_seat_model(self, seat: str) -> None:
        import_with_vllm("runtime.api.http.vllm_serving")
        from runtime.api.http.vllm_serving import EngineFront, SeatModel

        if seat in self._seat_models:
            return
        engine = self.team.seats[seat].engine
        if engine not in self._fronts:
            self._fronts[engine] = EngineFront(engine, self.config.engines[engine], partial(self.generate, engine))
        self._seat_models[seat] = SeatModel(seat, self._fronts[engine])

    async def generate(self, engine: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply of an engine to a request that belongs to no job. Raises Busy or EngineError."""
        with self.metrics.timed_request(engine) as timer:
            async with aclosing(self.ready_team().generate(engine, request)) as chunks:
                async for chunk in chunks:
                    timer.record(chunk)
                    yield chunk


async def _backend(request: Request) -> Backend:  # FastAPI would call a plain function in a thread
    backend: Backend = request.app.state.backend
    return backend


BackendDep = Annotated[Backend, Depends(_backend)]
"""The type of a route's parameter that receives the Backend."""
