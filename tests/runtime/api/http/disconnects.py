"""Clients that disconnect before they get an answer."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.runtime.api.http.conftest import Served


async def chat_and_disconnect(served: Served, engine: str, requests: int = 1, **body: Any) -> None:
    """Send a chat, and disconnect once the engine has received this many requests, before the answer arrives."""
    stats = served.backend.engines[engine].stats
    before = stats().requests
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
        chat = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        async with asyncio.timeout(60):
            while stats().requests < before + requests:  # noqa: ASYNC110  the engine has no event for this
                await asyncio.sleep(0.01)
        chat.cancel()
        with pytest.raises(asyncio.CancelledError):
            await chat
