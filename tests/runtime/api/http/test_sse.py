"""Event streams, and clients that disconnect from them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from runtime.api.http import sse

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}


class Source:
    """Endless events; `closed` becomes True when their generator is closed."""

    closed = False

    async def lines(self) -> AsyncGenerator[str, None]:
        try:
            while True:
                yield sse.PING
        finally:
            self.closed = True


async def disconnected() -> Message:
    return {"type": "http.disconnect"}


async def discard(message: Message) -> None:
    await asyncio.sleep(0)


def nested(depth: int) -> Any:
    """Return lists within lists. JSON that a model wrote can be deeper than Python can write."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("data", [{"code": "\ud83d"}, nested(10**5)], ids=["half of a surrogate pair", "nested"])
def test_event_that_json_cannot_hold_becomes_a_comment(data: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert sse.format_event(data, 7) == "id: 7\n: this event cannot be shown\n\n"
    assert "the event 7 of a stream is left out" in caplog.text


async def test_disconnect_before_the_start_closes_the_source() -> None:
    source = Source()
    response = await sse.response_once_started(source.lines(), lambda: True)
    await response(SCOPE, disconnected, discard)
    assert source.closed


async def test_error_before_the_stream_has_started_is_raised() -> None:
    async def events() -> AsyncGenerator[str, None]:
        yield sse.PING
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await sse.response_once_started(events(), lambda: False)


async def test_disconnect_midway_closes_the_source_before_the_response_returns() -> None:
    source = Source()
    sent = 0

    async def send(message: Message) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            raise OSError("the connection is gone")

    async def receive() -> Message:
        raise AssertionError("not called: since ASGI 2.4, a disconnect is an error that send raises")

    response = sse.response(source.lines())
    lines = response.body_iterator  # keep a reference, because garbage collection would close the generator later
    with pytest.raises(ClientDisconnect):
        await response({**SCOPE, "asgi": {"spec_version": "2.4"}}, receive, send)
    assert source.closed
    del lines
