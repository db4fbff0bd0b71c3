"""Routes that show engines, devices and controllers, that pin engines, pause controllers and change their policy."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from runtime.api import admin
from runtime.api.admin import Pin
from runtime.api.auth import Scope
from runtime.api.http.auth import require
from runtime.api.http.backend import Backend, BackendDep
from runtime.api.http.errors import ERRORS
from runtime.api.monitor import device_moment, engine_moment
from runtime.control.costs import StepCost
from runtime.control.snapshot import DeviceMoment
from runtime.devices.rebalancer import Change
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState, EngineStats
from runtime.engines.replicas import engine_of
from runtime.engines.usage import Held, Spent

router = APIRouter(tags=["control"], responses=ERRORS)
_READ = [Depends(require(Scope.READ))]
_CONTROL = [Depends(require(Scope.CONTROL))]


class GrantView(BaseModel):
    """The memory and concurrency that an engine may use."""

    gpu_memory_utilization: float = Field(description="The engine's share of the device, weights included.")
    max_active_seqs: int = Field(
        description="The most sequences that it may run at once; 0 means that admission is paused."
    )
    max_step_tokens: int = Field(description="The most tokens that it may process in one step.")


class LimitsView(BaseModel):
    """The lowest and highest value of each part of an engine's grant."""

    gpu_memory_utilization: tuple[float, float]
    max_active_seqs: tuple[int, int]
    max_step_tokens: tuple[int, int]


class EngineInfo(BaseModel):
    """An engine: its seats, its state, its grant and limits, its load, and what its steps cost."""

    name: str = Field(description="The engine's name. With several devices, a replica's: `<engine>@<device>`.")
    engine: str = Field(description="The engine's name in the configuration.")
    device: str | None = Field(description="The device that it runs on; null until it is up.")
    model: str = Field(description="The model's name or path.")
    seats: list[str] = Field(description="The seats of the team that this engine serves.")
    state: EngineState
    pinned: bool = Field(description="True if a pin holds the engine's grant.")
    grant: GrantView | None = Field(
        description="The engine's grant, or the one that follows a deferred shrink; null until the engine has started."
    )
    limits: LimitsView | None = Field(description="The bounds of its grant; null until it is up.")
    kv_cache_bytes: int = Field(description="Size of the KV cache in bytes.")
    kv_cache_usage: float = Field(description="The fraction of the KV cache in use, from 0 to 1.")
    running: int = Field(description="Requests that the engine is running.")
    waiting: int = Field(description="Requests that wait for the engine.")
    held: int = Field(description="Requests that arrived while it slept, since the service started.")
    sleep_s: float = Field(description="The seconds that it takes to go to sleep; 0 until it has slept.")
    wake_s: float = Field(description="The seconds that it takes to wake; until it has slept, those to start.")
    paused_s: float = Field(description="For how long its admission has been paused, in seconds; 0 if it is not.")
    cost: StepCost | None = Field(description="The cost of its steps; null until the controller has seen it ready.")
    utilization: float | None = Field(
        description="The part of the time in which it used the GPU, from 0 to 1; null if NVML does not report it."
    )
    memory: dict[Held, Spent] = Field(
        description="The seconds for which it was resident, waking and asleep, and the bytes of the device that it "
        "held meanwhile, times seconds."
    )
    preemptions: int = Field(description="Preempted requests since the engine started.")
    requests: int = Field(description="Requests since the engine started.")
    prompt_tokens: int = Field(description="Prompt tokens since the engine started.")
    completion_tokens: int = Field(description="Generated tokens since the engine started.")


class ResidencyView(BaseModel):
    """The policy that puts engines to sleep and wakes them, and counts since the service started."""

    policy: str = Field(description="The residency policy that decides.")
    wakes: int = Field(description="Engines that woke.")
    sleeps: int = Field(description="Engines that went to sleep.")
    ahead: int = Field(description="Wakes that began before a request needed them.")
    wasted: int = Field(description="Wakes of engines that slept again without a request.")
    refused: int = Field(description="Decisions that could not be carried out.")


class ControlView(BaseModel):
    """The controllers of all devices: their policy, pins, and counts since the service started."""

    policy: str = Field(description="The policy that decides.")
    paused: bool = Field(description="True if the controllers are paused, so that grants stay as they are.")
    pinned: dict[str, GrantView] = Field(description="The pinned engines and the grants that they are held at.")
    unfit_pins: dict[str, str] = Field(description="For each pin that is not in force, the reason.")
    decisions: int = Field(description="Decisions made.")
    faults: int = Field(description="Decisions that failed.")
    resizes: int = Field(description="Grants that engines applied.")
    rejected: int = Field(description="Grants that engines rejected.")
    moved_bytes: int = Field(description="Bytes of memory moved.")
    residency: ResidencyView = Field(description="Which engines are on their devices.")


@router.get("/engines", dependencies=_READ)
async def list_engines(backend: BackendDep) -> list[EngineInfo]:
    """List all engines."""
    return [engine_info(backend, name) for name in backend.monitor.states]


@router.get("/devices", dependencies=_READ)
async def list_devices(backend: BackendDep) -> dict[str, DeviceMoment]:
    """List the engines' devices by name, as telemetry sees them. A device is listed after its first snapshot.

    `lanes` is how many engines the device serves at full speed at once.
    """
    return {name: device_moment(snapshot) for name, snapshot in backend.snapshots.items()}


@router.get("/control", dependencies=_READ)
async def retrieve_controller(backend: BackendDep) -> ControlView:
    """Retrieve the policy, the pins and the counts of the controllers."""
    team = backend.ready_team()
    controllers, counts = team.controllers, team.controllers.counts
    return ControlView(
        policy=controllers.policy,
        paused=controllers.paused,
        pinned={name: _grant_view(grant) for name, grant in controllers.pinned.items()},
        unfit_pins=controllers.unfit_pins,
        decisions=counts.decisions,
        faults=counts.faults,
        resizes=counts.resizes,
        rejected=counts.rejected,
        moved_bytes=counts.moved_bytes,
        residency=ResidencyView(policy=team.residency_policy, **asdict(team.residency_counts)),
    )


@router.get("/control/decisions", dependencies=_READ)
async def list_decisions(
    backend: BackendDep,
    limit: Annotated[int, Query(ge=1, le=200, description="The number of decisions to return at most.")] = 20,
) -> list[dict[str, Any]]:
    """List the latest decisions that changed a grant or failed, newest first, with the reason for each grant."""
    return [asdict(decision) for decision in [*backend.monitor.decisions][: -limit - 1 : -1]]


@router.get("/control/placements", dependencies=_READ)
async def list_placements(
    backend: BackendDep,
    limit: Annotated[int, Query(ge=1, le=200, description="The number of changes to return at most.")] = 20,
) -> list[Change]:
    """List the latest changes of where engines have replicas, newest first, with the reason for each."""
    return [*backend.ready_team().rebalancer.changes][: -limit - 1 : -1]


@router.patch("/control", dependencies=_CONTROL)
async def update_controller(body: admin.Change, backend: BackendDep) -> ControlView:
    """Pause or resume the controller, or change its policy."""
    body.apply(backend.ready_team())
    return await retrieve_controller(backend)


@router.put("/control/pins/{engine}", dependencies=_CONTROL)
async def pin_engine(engine: str, body: Pin, backend: BackendDep) -> ControlView:
    """Hold an engine at a grant. Values that you leave out stay as they are; the policy divides the rest."""
    body.apply(backend.ready_team(), engine)
    return await retrieve_controller(backend)


@router.delete("/control/pins/{engine}", dependencies=_CONTROL)
async def unpin_engine(engine: str, backend: BackendDep) -> ControlView:
    """Let the policy size an engine again."""
    admin.unpin(backend.ready_team(), engine)
    return await retrieve_controller(backend)


def engine_info(backend: Backend, name: str) -> EngineInfo:
    """Return the state of an engine. Counts are 0 until it is up."""
    running_team = backend.running_team
    handle = backend.engines.get(name)
    stats = handle.stats() if handle else EngineStats(backend.monitor.states[name])
    view = next((each.engines[name] for each in backend.snapshots.values() if name in each.engines), None)
    moment = engine_moment(view) if view else None
    engine = engine_of(name)
    return EngineInfo(
        name=name,
        engine=engine,
        device=next((d.name for d in running_team.devices.values() if name in d.engines), None)
        if running_team
        else None,
        model=backend.config.engines[engine].model,
        seats=[seat.name for seat in backend.team.seats.values() if seat.engine == engine],
        state=stats.state,
        pinned=running_team is not None and name in running_team.controllers.pinned,
        grant=_grant_view(stats.grant) if stats.grant else None,
        limits=_limits_view(backend, name) if stats.grant else None,
        kv_cache_bytes=stats.kv_cache_bytes,
        kv_cache_usage=stats.kv_cache_usage,
        running=stats.running,
        waiting=stats.waiting,
        held=stats.held,
        sleep_s=stats.sleep_s,
        wake_s=stats.wake_s,
        paused_s=moment.paused_s if moment else 0.0,
        cost=moment.cost if moment else None,
        utilization=moment.utilization if moment else None,
        memory=dict(handle.usage.spent()) if handle else {},
        preemptions=stats.preemptions,
        requests=stats.requests,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
    )


def _grant_view(grant: Grant) -> GrantView:
    return GrantView(**asdict(grant))


def _limits_view(backend: Backend, name: str) -> LimitsView:
    limits = backend.engines[name].limits
    return LimitsView(
        gpu_memory_utilization=(limits.share(limits.kv_floor_bytes), min(limits.share(limits.kv_ceiling_bytes), 1.0)),
        max_active_seqs=(1, limits.seqs_ceiling),
        max_step_tokens=(limits.step_tokens_floor, limits.step_tokens_ceiling),
    )
