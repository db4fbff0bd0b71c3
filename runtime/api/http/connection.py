"""Work for as long as somebody waits for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response

GONE = 499
"""Nobody reads it; nginx's number for a client that has closed the connection."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work, and cancel it when the client goes away before it is done. The request's body has been read."""
    task = asyncio.create_task(work, name=f"{request.method} {request.url.path}")
    gone = asyncio.create_task(_gone(request), name="wait for the client to go")
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=GONE)
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait([task, gone])


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
