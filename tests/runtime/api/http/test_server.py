"""Connections that send no request, an endless one or a late one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from runtime.api.http import limits, server
from tests.runtime.api.http.conftest import Served, Start

REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
WAIT_S = 30


@asynccontextmanager
async def connection(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer_of(served: Served, *parts: bytes) -> bytes:
    """Send parts of a request one after the other. Return what the server answers until it closes the connection."""
    async with connection(served) as (reader, writer):
        with suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
        return await rest_of(reader)


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    received = b""
    with suppress(ConnectionError):
        async with asyncio.timeout(WAIT_S):
            while data := await reader.read(1 << 16):
                received += data
    return received


async def test_connections_that_send_nothing_are_closed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(server, "HEADERS_S", 0.2)
        served = await start(connections_max=3)
        closed = await asyncio.gather(*(answer_of(served) for _ in range(3)))
    assert closed == [b""] * 3
    assert (await served.client.get("/health")).status_code == 200


@pytest.mark.parametrize("before", [b"", REQUEST + b"\r\n"], ids=["first", "after a response"])
async def test_connection_without_complete_headers_is_closed(
    start: Start, before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single bytes keep a connection open for HEADERS_S only."""
    monkeypatch.setattr(server, "HEADERS_S", 2)
    served = await start()
    async with connection(served) as (reader, writer):
        if before:
            writer.write(before)
            await reader.readuntil(b"\r\n\r\n")
        closed = asyncio.create_task(rest_of(reader))
        async with asyncio.timeout(WAIT_S):
            for byte in REQUEST + b"a" * 10_000:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)
                if closed.done():
                    break
        assert b"HTTP" not in await closed


async def test_slow_answer_is_not_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADERS_S", 2)
    served = await start(time_scale=50)
    job = (await served.client.post("/jobs", json={"problem": "(12+7)*3-(45-5)"})).json()["id"]
    ended = await served.client.get(f"/jobs/{job}/result", params={"wait_s": 60})
    assert ended.status_code == 200
    assert ended.json()["ended_at"] - ended.json()["submitted_at"] > 2


@pytest.mark.parametrize("header", [b"a: b\r\n" * 1000, b"a" * 10_000], ids=["many", "one"])
async def test_endless_headers_are_refused(served: Served, header: bytes) -> None:
    answer = await answer_of(served, REQUEST, *[header] * 1000)
    assert b"200 OK" not in answer
    if answer:  # else the connection was reset before the answer was read
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b"The headers are too large: at most 65536 bytes are allowed.")


async def test_endless_trailers_are_refused(served: Served) -> None:
    head = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    answer = await answer_of(served, head, b"\r\n2\r\n{}\r\n0\r\n", *[b"a: b\r\n" * 1000] * 1000)
    assert b"202 Accepted" not in answer


async def test_large_headers_pass(served: Served) -> None:
    response = await served.client.get("/health", headers={"a": "b" * 60_000})
    assert response.status_code == 200


async def test_late_body_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.2)
    served = await start()
    async with connection(served) as (reader, writer):
        writer.write(b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 100\r\nConnection: close\r\n\r\n{")
        answer = await rest_of(reader)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.2 s" in answer
