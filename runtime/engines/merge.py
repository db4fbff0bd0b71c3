"""Merges streams into one."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


def merge(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Return a stream of the items of all streams as they arrive.

    It raises the first failure. After a failure, or if it is closed early, it closes the other streams.
    """
    return streams[0] if len(streams) == 1 else _merged(streams)  # the usual case, one stream, needs no tasks


async def _merged(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    arrived: asyncio.Queue[tuple[T] | None] = asyncio.Queue()  # None marks the end
    forwarding = asyncio.create_task(_forward_all(streams, arrived), name="choices")
    forwarding.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (item := await arrived.get()) is not None:
            yield item[0]
        try:
            forwarding.result()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
    finally:
        forwarding.cancel()
        await asyncio.wait([forwarding])


async def _forward_all(streams: list[AsyncGenerator[T, None]], arrived: "asyncio.Queue[tuple[T] | None]") -> None:
    async with asyncio.TaskGroup() as group:
        for index, stream in enumerate(streams):
            group.create_task(_forward(stream, arrived), name=f"choice {index}")


async def _forward(stream: AsyncGenerator[T, None], arrived: "asyncio.Queue[tuple[T] | None]") -> None:
    async with aclosing(stream) as items:
        async for item in items:
            arrived.put_nowait((item,))
