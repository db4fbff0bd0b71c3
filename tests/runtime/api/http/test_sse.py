"""Streams of events, and those who leave them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from runtime.api.http import sse

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}


class Source:
    """Events that could go on for ever; `closed` when nobody waits for more of them."""

    closed = False

    async def events(self) -> AsyncGenerator[dict[str, Any] | str, None]:
        try:
            while True:
                yield {"n": 1}
        finally:
            self.closed = True

    async def lines(self) -> AsyncGenerator[str, None]:
        try:
            while True:
                yield sse.PING
        finally:
            self.closed = True


async def gone() -> Message:
    return {"type": "http.disconnect"}


async def into_the_void(message: Message) -> None:
    await asyncio.sleep(0)


async def test_what_a_stream_comes_from_is_closed_if_its_reader_has_gone_before_it_begins() -> None:
    source = Source()
    response = await sse.response(source.events())
    await response(SCOPE, gone, into_the_void)
    assert source.closed


async def test_an_error_before_the_first_event_is_raised_and_not_streamed() -> None:
    async def events() -> AsyncGenerator[dict[str, Any] | str, None]:
        raise ValueError("no")
        yield ""

    with pytest.raises(ValueError, match="no"):
        await sse.response(events())


async def test_a_stream_that_is_left_half_way_closes_its_source_before_it_returns() -> None:
    source = Source()
    sent = 0

    async def send(message: Message) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            raise OSError("the connection is gone")

    async def stays() -> Message:
        raise AssertionError("not asked: the server tells of a reader that has gone by an error of send")

    response = sse.stream(source.lines())
    lines = response.body_iterator  # held: collecting garbage would close it too, some time later
    with pytest.raises(ClientDisconnect):
        await response({**SCOPE, "asgi": {"spec_version": "2.4"}}, stays, send)
    assert source.closed
    del lines
