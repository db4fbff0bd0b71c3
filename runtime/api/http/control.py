"""The engines and who gets how much: look, pin, pause, change the policy."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from runtime.api import admin
from runtime.api.admin import Change, Pin
from runtime.api.http.auth import Scope, may
from runtime.api.http.backend import Backend, Backing
from runtime.api.http.errors import ERRORS
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState

router = APIRouter(tags=["control"], responses=ERRORS)
_READS = [Depends(may(Scope.READ))]
_CONTROLS = [Depends(may(Scope.CONTROL))]


class GrantView(BaseModel):
    """What an engine may use: its share of the device, sequences at once, tokens a step."""

    gpu_memory_utilization: float
    max_active_seqs: int
    max_step_tokens: int


class LimitsView(BaseModel):
    """How far an engine's grants can go."""

    gpu_memory_utilization: tuple[float, float]
    max_active_seqs: tuple[int, int]
    max_step_tokens: tuple[int, int]


class EngineInfo(BaseModel):
    """One engine: its state, its seats, its grant and how far that can go, and what it does."""

    name: str
    model: str
    seats: list[str]
    state: EngineState
    pinned: bool
    grant: GrantView | None
    limits: LimitsView | None
    kv_cache_bytes: int
    kv_cache_usage: float
    running: int
    waiting: int
    preemptions: int
    requests: int
    prompt_tokens: int
    completion_tokens: int


class ControlView(BaseModel):
    """Who decides, and what came of it so far. `unfit_pins` says why pins are not in force, by engine."""

    policy: str
    paused: bool
    pinned: dict[str, GrantView]
    unfit_pins: dict[str, str]
    decisions: int
    faults: int
    resizes: int
    rejected: int
    moved_bytes: int


@router.get("/engines", dependencies=_READS)
async def engines(backing: Backing) -> list[EngineInfo]:
    """All engines."""
    return [engine_info(backing, name) for name in backing.status.states]


@router.get("/control", dependencies=_READS)
async def control(backing: Backing) -> ControlView:
    """The controller."""
    controller = backing.running.controller
    counts = controller.counts
    return ControlView(
        policy=controller.policy,
        paused=controller.paused,
        pinned={name: _grant(grant) for name, grant in controller.pinned.items()},
        unfit_pins=dict(controller.unfit_pins),
        decisions=counts.decisions,
        faults=counts.faults,
        resizes=counts.resizes,
        rejected=counts.rejected,
        moved_bytes=counts.moved_bytes,
    )


@router.get("/control/decisions", dependencies=_READS)
async def decisions(backing: Backing, limit: Annotated[int, Query(ge=1, le=200)] = 20) -> list[dict[str, Any]]:
    """The last decisions that changed something, with their reasons, the newest first."""
    return [asdict(decision) for decision in [*backing.status.decisions][: -limit - 1 : -1]]


@router.patch("/control", dependencies=_CONTROLS)
async def change(body: Change, backing: Backing) -> ControlView:
    """Pause or resume; let another policy decide."""
    body.apply(backing.running)
    return await control(backing)


@router.put("/control/pins/{engine}", dependencies=_CONTROLS)
async def pin(engine: str, body: Pin, backing: Backing) -> ControlView:
    """Hold an engine at a grant, by default the one that it has; policies divide what is left."""
    body.apply(backing.running, engine)
    return await control(backing)


@router.delete("/control/pins/{engine}", dependencies=_CONTROLS)
async def unpin(engine: str, backing: Backing) -> ControlView:
    """Let policies decide about an engine again."""
    admin.unpin(backing.running, engine)
    return await control(backing)


def engine_info(backing: Backend, name: str) -> EngineInfo:
    """One engine, whatever its state."""
    seats = [seat.name for seat in backing.team.seats.values() if seat.engine == name]
    spec = backing.config.engines[name]
    stats = backing.engines[name].stats() if name in backing.engines else None
    return EngineInfo(
        name=name,
        model=spec.model,
        seats=seats,
        state=stats.state if stats else backing.status.states[name],
        pinned=backing.running_team is not None and name in backing.running_team.controller.pinned,
        grant=_grant(stats.grant) if stats and stats.grant else None,
        limits=_limits(backing, name) if stats and stats.grant else None,
        kv_cache_bytes=stats.kv_cache_bytes if stats else 0,
        kv_cache_usage=stats.kv_cache_usage if stats else 0.0,
        running=stats.running if stats else 0,
        waiting=stats.waiting if stats else 0,
        preemptions=stats.preemptions if stats else 0,
        requests=stats.requests if stats else 0,
        prompt_tokens=stats.prompt_tokens if stats else 0,
        completion_tokens=stats.completion_tokens if stats else 0,
    )


def _grant(grant: Grant) -> GrantView:
    return GrantView(**asdict(grant))


def _limits(backing: Backend, name: str) -> LimitsView:
    limits = backing.engines[name].limits
    return LimitsView(
        gpu_memory_utilization=(limits.share(limits.kv_floor_bytes), min(limits.share(limits.kv_ceiling_bytes), 1.0)),
        max_active_seqs=(1, limits.seqs_ceiling),
        max_step_tokens=(limits.step_tokens_floor, limits.step_tokens_ceiling),
    )
