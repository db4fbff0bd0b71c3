"""Server-sent events: their wire format, and responses that stream them."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = "data: [DONE]\n\n"
"""The last event of a stream of chat completions."""
PING = ": nothing new\n\n"
"""A comment, which clients ignore."""
PING_S = 15.0
"""A silent stream sends a PING this often, because only a write reveals that the client has disconnected."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Keep proxies from buffering events."""


async def response_once_started(events: AsyncGenerator[str, None], started: Callable[[], bool]) -> StreamingResponse:
    """Return a stream of formatted events once `started` returns True, so that an earlier error gets an HTTP status.

    The response closes `events` when the stream ends or the client disconnects.
    """
    held = []
    async for event in events:
        held.append(event)
        if started():
            break

    async def all_events() -> AsyncGenerator[str, None]:
        for event in held:
            yield event
        async for event in events:
            yield event

    return _OwningResponse(all_events(), events)


def format_event(data: Any, id: int | None = None, kind: str | None = None) -> str:
    """Return one event. Clients resume from its id, and tell events apart by their kind.

    If UTF-8 JSON cannot hold the data, log that and return a comment, so that the stream continues.
    """
    id_line = "" if id is None else f"id: {id}\n"
    kind_line = "" if kind is None else f"event: {kind}\n"
    try:
        line = json.dumps(data, ensure_ascii=False)
        line.encode()
    except (UnicodeEncodeError, RecursionError) as error:
        logging.getLogger(__name__).error("the event %s of a stream is left out: %s", id, error)
        return f"{id_line}: this event cannot be shown\n\n"
    return f"{id_line}{kind_line}data: {line}\n\n"


def response(events: AsyncGenerator[str, None]) -> StreamingResponse:
    """Return a stream of formatted events. It closes `events` when it ends or the client disconnects."""
    return _OwningResponse(events, events)


class _OwningResponse(StreamingResponse):
    """A stream of `lines` that closes their source when the stream ends or the client disconnects."""

    def __init__(self, lines: AsyncGenerator[str, None], source: AsyncGenerator[Any, None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=_HEADERS)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            await super().__call__(scope, receive, send)


async def with_timeouts(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """Yield the items, and None whenever PING_S seconds pass without one."""
    upcoming: asyncio.Future[T] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait([upcoming], timeout=PING_S)
            if not done:
                yield None
                continue
            try:
                item = upcoming.result()
            except StopAsyncIteration:
                return
            finally:
                upcoming = None
            yield item
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.wait([upcoming])
        await items.aclose()
