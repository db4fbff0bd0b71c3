"""Merges the streamed replies to several requests into one stream."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from runtime.engines.request import Chunk


async def merge(replies: list[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield the chunks of all replies as they arrive, each with the index of its reply.

    Raises the first failure. After a failure, or if this generator is closed early, it closes the other replies, which
    aborts their requests.
    """
    if len(replies) == 1:  # the usual case needs no tasks
        async with aclosing(replies[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    arrived: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()
    forwarding = asyncio.create_task(_forward_all(replies, arrived), name="choices")
    forwarding.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (item := await arrived.get()) is not None:
            yield item
        try:
            forwarding.result()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
    finally:
        forwarding.cancel()
        await asyncio.wait([forwarding])


async def _forward_all(
    replies: list[AsyncGenerator[Chunk, None]], arrived: "asyncio.Queue[tuple[int, Chunk] | None]"
) -> None:
    async with asyncio.TaskGroup() as group:
        for index, reply in enumerate(replies):
            group.create_task(_forward(index, reply, arrived), name=f"choice {index}")


async def _forward(
    index: int, reply: AsyncGenerator[Chunk, None], arrived: "asyncio.Queue[tuple[int, Chunk] | None]"
) -> None:
    async with aclosing(reply) as chunks:
        async for chunk in chunks:
            arrived.put_nowait((index, chunk))
