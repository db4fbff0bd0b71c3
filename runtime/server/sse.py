"""Server-sent events: what a stream of them looks like, and how one is answered."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

T = TypeVar("T")

DONE = "[DONE]"
PING = ": nothing new\n\n"
PING_S = 15.0
"""So often a silent stream is written to, which is how a reader that has gone is noticed."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies are not to hold events back."""


def response(events: AsyncIterator[dict[str, Any] | str]) -> StreamingResponse:
    """OpenAI's streams: an object an event, without ids."""

    async def lines() -> AsyncIterator[str]:
        async for data in events:
            yield f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"

    return stream(lines())


def event(data: Any, id: int | None = None, kind: str | None = None) -> str:
    """One event, with an id to go on from, and a kind to listen for."""
    head = ("" if id is None else f"id: {id}\n") + ("" if kind is None else f"event: {kind}\n")
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"


def stream(events: AsyncIterator[str]) -> StreamingResponse:
    """A stream of events that are put together already."""
    return StreamingResponse(events, media_type="text/event-stream", headers=_HEADERS)


async def kept_alive(items: AsyncIterator[T]) -> AsyncIterator[T | None]:
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
        await items.aclose()  # type: ignore[attr-defined]
