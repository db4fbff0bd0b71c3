"""Jobs: submit, look at, cancel, wait for; and what happens to them, as events to go on from."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from runtime.api.http import sse
from runtime.api.http.auth import Scope, may
from runtime.api.http.backend import Backend, Backing
from runtime.api.http.connection import unless_gone
from runtime.api.http.errors import ERRORS
from runtime.errors import NotFound
from runtime.jobs.job import JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.records import JobEvent, JobRecord
from runtime.jobs.schemas import JobView
from runtime.jobs.submission import Submission

router = APIRouter(tags=["jobs"], responses=ERRORS)
_READS = [Depends(may(Scope.READ))]
_SUBMITS = [Depends(may(Scope.SUBMIT))]
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

JobId = str
After = Annotated[int | None, Query(ge=0, le=2**62, description="the event to go on after")]
LastEventId = Annotated[int | None, Header(ge=0, le=2**62, description="as `after`, which it goes before")]


class JobPage(BaseModel):
    """Some jobs, the newest first; `next` is the `before` of the following page, None where this is the last."""

    jobs: list[JobView]
    next: int | None


@router.post("/jobs", status_code=202, dependencies=_SUBMITS, responses={200: {"model": JobView}})
async def submit(body: Submission, backing: Backing, response: Response) -> JobView:
    """Accept a job (202), or find the one of the same idempotency key (200)."""
    record, new = await backing.jobs.submit(body)
    response.status_code = 202 if new else 200
    response.headers["Location"] = f"/jobs/{record.id}"
    return JobView.of(record)


@router.get("/jobs", dependencies=_READS)
async def listed(
    backing: Backing,
    state: JobState | None = None,
    before: Annotated[int | None, Query(ge=1, le=2**62)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> JobPage:
    """Jobs, the newest first."""
    records = await backing.jobs.journal.read(partial(queries.jobs, state=state, before=before, limit=limit))
    following = records[-1].number if len(records) == limit else None
    return JobPage(jobs=[JobView.of(record) for record in records], next=following)


@router.get("/jobs/{id}", dependencies=_READS)
async def job(id: JobId, backing: Backing) -> JobView:
    """One job."""
    return JobView.of(await _record(id, backing))


@router.post("/jobs/{id}/cancel", dependencies=_SUBMITS)
async def cancel(id: JobId, backing: Backing) -> JobView:
    """Cancel a job; one that has ended stays as it is."""
    record = await backing.jobs.cancel(id)
    if record is None:
        raise _unknown(id)
    return JobView.of(record)


@router.get("/jobs/{id}/result", dependencies=_READS, response_model=JobView, responses={202: {"model": JobView}})
async def result(
    id: JobId,
    request: Request,
    backing: Backing,
    wait_s: Annotated[float, Query(ge=0, le=3600, description="how long to wait for its end")] = 0,
) -> Response:
    """A job that has ended (200), or as it is after the wait (202)."""
    return await unless_gone(request, _ended(await _record(id, backing), backing, wait_s))


async def _ended(record: JobRecord, backing: Backend, wait_s: float) -> Response:
    if wait_s and not record.state.ended:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s), aclosing(backing.jobs.feed.follow_job(record.id)) as events:
                async for _ in events:
                    pass
        record = await _record(record.id, backing)
    return JSONResponse(JobView.of(record).model_dump(mode="json"), 200 if record.state.ended else 202)


@router.get("/jobs/{id}/events", dependencies=_READS, response_class=StreamingResponse, responses=_EVENTS)
async def events_of(
    id: JobId,
    backing: Backing,
    after: After = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**62)] = None,
) -> StreamingResponse:
    """What happens to a job, until it has ended: server-sent events, from the one after Last-Event-ID on."""
    await _record(id, backing)
    return sse.stream(_lines(backing.jobs.feed.follow_job(id, last_event_id or after or 0)))


@router.get("/events", dependencies=_READS, response_class=StreamingResponse, responses=_EVENTS)
async def events(
    backing: Backing,
    after: After = None,
    last: Annotated[int, Query(ge=0, le=10_000, description="begin with so many of the latest")] = 0,
    last_event_id: LastEventId = None,
) -> StreamingResponse:
    """What happens to all jobs: server-sent events, from the one after Last-Event-ID on, by default from now on."""
    since = last_event_id if last_event_id is not None else after
    if since is None:
        since = max(await backing.jobs.journal.read(queries.last_event) - last, 0)
    return sse.stream(_lines(backing.jobs.feed.follow(since)))


async def _lines(events: AsyncGenerator[JobEvent, None]) -> AsyncGenerator[str, None]:
    async with aclosing(sse.kept_alive(events)) as alive:
        async for event in alive:
            yield sse.PING if event is None else sse.event(event.as_json(), event.id)


async def _record(id: str, backing: Backend) -> JobRecord:
    record = await backing.jobs.get(id)
    if record is None:
        raise _unknown(id)
    return record


def _unknown(id: str) -> NotFound:
    return NotFound(f"there is no job {id[:100]!r}")
