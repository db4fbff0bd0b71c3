"""The live page, and the event stream that it draws."""

from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse

from runtime.api.auth import Scope
from runtime.api.http import sse
from runtime.api.http.auth import require
from runtime.api.http.backend import Backend, BackendDep
from runtime.api.http.errors import ERRORS

PAGE = Path(__file__).parent / "page"
router = APIRouter(tags=["live"], responses=ERRORS)


@router.get(
    "/live",
    dependencies=[Depends(require(Scope.READ))],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def stream_live_state(backend: BackendDep) -> StreamingResponse:
    """Stream the state of the engines, the devices and the jobs as server-sent events.

    The first event, of kind `history`, holds the last ten minutes. An event of kind `sample` follows at most every half
    second and whenever an engine changes its state. An event of kind `decision` follows for every decision of the
    controller that changes a grant or fails.
    """
    return sse.response(_live_events(backend))


async def _live_events(backend: Backend) -> AsyncGenerator[str, None]:
    monitor = backend.monitor
    yield sse.format_event(
        {
            "team": {seat.name: seat.engine for seat in backend.team.seats.values()},
            "samples": [asdict(sample) for sample in monitor.samples],
            "decisions": [asdict(decision) for decision in monitor.decisions],
            "now": _current_state(backend),
        },
        kind="history",
    )
    last_sample_at = monitor.samples[-1].at if monitor.samples else 0.0
    last_number = monitor.decisions[-1].number if monitor.decisions else 0
    async for news in sse.with_timeouts(_news(backend)):
        if news is None:
            yield sse.PING
            continue
        for decision in [*monitor.decisions]:
            if decision.number > last_number:
                last_number = decision.number
                yield sse.format_event(asdict(decision), kind="decision")
        sample = None
        if monitor.samples and monitor.samples[-1].at > last_sample_at:
            sample = asdict(monitor.samples[-1])
            last_sample_at = monitor.samples[-1].at
        yield sse.format_event({"now": _current_state(backend), "sample": sample}, kind="sample")


async def _news(backend: Backend) -> AsyncGenerator[bool, None]:
    while True:
        await backend.monitor.wait_for_change()
        yield True


def _current_state(backend: Backend) -> dict[str, Any]:
    """Return what has no history: readiness, engine states, pins, and whether and by which policy the team is sized."""
    controllers = backend.running_team.controllers if backend.running_team else None
    return {
        "unready": backend.why_not_ready(),
        "states": {name: str(state) for name, state in backend.monitor.states.items()},
        "pinned": [*controllers.pinned] if controllers else [],
        "policy": controllers.policy if controllers else None,
        "paused": bool(controllers and controllers.paused),
    }
