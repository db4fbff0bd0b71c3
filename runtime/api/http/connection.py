"""Cancellation of a request's work when its client disconnects."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that closed the connection. No client receives it."""


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the response that `work` produces; cancel `work` if the client disconnects first.

    The request's body must have been read already.
    """
    task = asyncio.create_task(work, name=f"{request.method} {request.url.path}")
    disconnect = asyncio.create_task(_wait_for_disconnect(request), name="wait for disconnect")
    try:
        await asyncio.wait([task, disconnect], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.wait([task, disconnect])


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
