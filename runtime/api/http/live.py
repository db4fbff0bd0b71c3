"""The live page, and the stream that it draws: engines, device and jobs twice a second, and decisions as they come."""

from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse

from runtime.api.http import sse
from runtime.api.http.auth import Scope, may
from runtime.api.http.backend import Backend, Backing
from runtime.api.http.errors import ERRORS

PAGE = Path(__file__).parent / "page"
router = APIRouter(tags=["live"], responses=ERRORS)


@router.get(
    "/live",
    dependencies=[Depends(may(Scope.READ))],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def live(backing: Backing) -> StreamingResponse:
    """Server-sent events of the kinds `history` (once: the last ten minutes), `sample`, and `decision`."""
    return sse.stream(_lines(backing))


async def _lines(backing: Backend) -> AsyncGenerator[str, None]:
    status = backing.status
    yield sse.event(
        {
            "team": {seat.name: seat.engine for seat in backing.team.seats.values()},
            "samples": [asdict(sample) for sample in status.samples],
            "decisions": [asdict(decision) for decision in status.decisions],
            "now": _now(backing),
        },
        kind="history",
    )
    at = status.samples[-1].at if status.samples else 0.0
    number = status.decisions[-1].number if status.decisions else 0
    async for item in sse.kept_alive(_news(backing)):
        if item is None:
            yield sse.PING
            continue
        for decision in [*status.decisions]:
            if decision.number > number:
                number = decision.number
                yield sse.event(asdict(decision), kind="decision")
        sample = status.samples[-1] if status.samples and status.samples[-1].at > at else None
        at = sample.at if sample else at
        yield sse.event({"now": _now(backing), "sample": asdict(sample) if sample else None}, kind="sample")


async def _news(backing: Backend) -> AsyncGenerator[bool, None]:
    while True:
        await backing.status.news()
        yield True


def _now(backing: Backend) -> dict[str, Any]:
    """What is not history: states, pins, who decides."""
    controller = backing.running_team.controller if backing.running_team else None
    return {
        "unready": backing.unready,
        "states": {name: str(state) for name, state in backing.status.states.items()},
        "pinned": [*controller.pinned] if controller else [],
        "policy": controller.policy if controller else None,
        "paused": bool(controller and controller.paused),
    }
