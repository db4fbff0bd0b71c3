"""Server-sent events: what a stream of them looks like, and how one is answered."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = "[DONE]"
PING = ": nothing new\n\n"
PING_S = 15.0
"""So often a silent stream is written to, which is how a reader that has gone is noticed."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies are not to hold events back."""


async def response(events: AsyncGenerator[dict[str, Any] | str, None]) -> StreamingResponse:
    """Return OpenAI's kind of stream: an object an event, without ids.

    Awaits the first event, so that an earlier error gets its own HTTP status, and the generator's cleanup runs if the
    client disconnects.
    """
    first = await anext(events)

    async def lines() -> AsyncGenerator[str, None]:
        yield _line(first)
        async for data in events:
            yield _line(data)

    return _Owning(lines(), events)


def _line(data: dict[str, Any] | str) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def event(data: Any, id: int | None = None, kind: str | None = None) -> str:
    """One event, with an id to go on from, and a kind to listen for."""
    head = ("" if id is None else f"id: {id}\n") + ("" if kind is None else f"event: {kind}\n")
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def stream(events: AsyncGenerator[str, None]) -> StreamingResponse:
    """A stream of events that are put together already."""
    return _Owning(events, events)


class _Owning(StreamingResponse):
    """A stream of `lines` that closes what they come from when it ends, or its reader goes away."""

    def __init__(self, lines: AsyncGenerator[str, None], source: AsyncGenerator[Any, None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=_HEADERS)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            await super().__call__(scope, receive, send)


async def kept_alive(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """The items, and None whenever none has come for a while."""
    following: asyncio.Future[T] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait([following], timeout=PING_S)
            if not done:
                yield None
                continue
            try:
                item = following.result()
            except StopAsyncIteration:
                return
            finally:
                following = None
            yield item
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait([following])
        await items.aclose()
