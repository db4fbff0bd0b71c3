"""Routes that submit, list, cancel and await jobs, and that stream their events."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from runtime.api.auth import Scope
from runtime.api.http import sse
from runtime.api.http.auth import require
from runtime.api.http.backend import Backend, BackendDep
from runtime.api.http.connection import cancel_on_disconnect
from runtime.api.http.errors import ERRORS
from runtime.jobs.job import JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.records import JobEvent, JobRecord
from runtime.jobs.schemas import JobView
from runtime.jobs.submission import Submission

router = APIRouter(tags=["jobs"], responses=ERRORS)
_READ = [Depends(require(Scope.READ))]
_SUBMIT = [Depends(require(Scope.SUBMIT))]
_EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}

After = Annotated[int | None, Query(ge=0, le=2**62, description="Return only events after the one with this id.")]
LastEventId = Annotated[
    int | None,
    Header(ge=0, le=2**62, description="The id of the last event that the client received. Overrides `after`."),
]


class JobPage(BaseModel):
    """A page of jobs."""

    jobs: list[JobView] = Field(description="The jobs, newest first.")
    next: int | None = Field(description="Pass this as `before` to get the next page; null on the last page.")


@router.post("/jobs", status_code=202, dependencies=_SUBMIT, responses={200: {"model": JobView}})
async def submit_job(body: Submission, backend: BackendDep, response: Response) -> JobView:
    """Submit a job.

    Returns 202 once the job is stored, or 200 with the existing job if the idempotency key was used before.
    """
    record, new = await backend.jobs.submit(body)
    response.status_code = 202 if new else 200
    response.headers["Location"] = f"/jobs/{record.id}"
    return JobView.of(record)


@router.get("/jobs", dependencies=_READ)
async def list_jobs(
    backend: BackendDep,
    state: Annotated[JobState | None, Query(description="Return only jobs in this state.")] = None,
    before: Annotated[int | None, Query(ge=1, le=2**62, description="The `next` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="The number of jobs to return at most.")] = 100,
) -> JobPage:
    """List jobs, newest first."""
    records = await backend.jobs.journal.read(partial(queries.jobs, state=state, before=before, limit=limit))
    following = records[-1].number if len(records) == limit else None
    return JobPage(jobs=[JobView.of(record) for record in records], next=following)


@router.get("/jobs/{id}", dependencies=_READ)
async def retrieve_job(id: str, backend: BackendDep) -> JobView:
    """Retrieve a job."""
    return JobView.of(await backend.jobs.find(id))


@router.post("/jobs/{id}/cancel", dependencies=_SUBMIT)
async def cancel_job(id: str, backend: BackendDep) -> JobView:
    """Cancel a job. A job that has ended stays as it is."""
    return JobView.of(await backend.jobs.cancel(id))


@router.get("/jobs/{id}/result", dependencies=_READ, response_model=JobView, responses={202: {"model": JobView}})
async def await_job(
    id: str,
    request: Request,
    backend: BackendDep,
    wait_s: Annotated[float, Query(ge=0, le=3600, description="Seconds to wait for the job to end.")] = 0,
) -> Response:
    """Wait for a job to end. Returns 200 if it has ended, and 202 with its current state if not."""
    return await cancel_on_disconnect(request, _wait_for_end(await backend.jobs.find(id), backend, wait_s))


async def _wait_for_end(record: JobRecord, backend: Backend, wait_s: float) -> Response:
    if wait_s and not record.state.ended:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s), aclosing(backend.jobs.events.follow_job(record.id)) as events:
                async for _ in events:
                    pass
        record = await backend.jobs.find(record.id)
    return JSONResponse(JobView.of(record).model_dump(mode="json"), 200 if record.state.ended else 202)


@router.get("/jobs/{id}/events", dependencies=_READ, response_class=StreamingResponse, responses=_EVENT_STREAM)
async def stream_job_events(
    id: str, backend: BackendDep, after: After = None, last_event_id: LastEventId = None
) -> StreamingResponse:
    """Stream a job's events as server-sent events until it ends. Starts at its first event by default."""
    await backend.jobs.find(id)
    return sse.response(_format_events(backend.jobs.events.follow_job(id, last_event_id or after or 0)))


@router.get("/events", dependencies=_READ, response_class=StreamingResponse, responses=_EVENT_STREAM)
async def stream_events(
    backend: BackendDep,
    after: After = None,
    last: Annotated[
        int, Query(ge=0, le=10_000, description="Start with this many of the latest events if `after` is not given.")
    ] = 0,
    last_event_id: LastEventId = None,
) -> StreamingResponse:
    """Stream the events of all jobs as server-sent events. Starts with new events by default."""
    since = last_event_id if last_event_id is not None else after
    if since is None:
        since = max(await backend.jobs.journal.read(queries.last_event) - last, 0)
    return sse.response(_format_events(backend.jobs.events.follow(since)))


async def _format_events(events: AsyncGenerator[JobEvent, None]) -> AsyncGenerator[str, None]:
    async with aclosing(sse.with_timeouts(events)) as events_or_timeouts:
        async for event in events_or_timeouts:
            yield sse.PING if event is None else sse.format_event(event.as_json(), event.id)
