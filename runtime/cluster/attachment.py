"""The attachment of one head to an agent: the messages in both directions, and the head's calls."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine

from runtime.cluster import wire
from runtime.errors import Death, EngineDead, EngineError

OUTBOX_ITEMS = 10_000
"""Items until an outbox ends and the head opens it again. Ray keeps some memory for each item of a stream."""


class Refused(EngineError):
    """The agent does not serve this head. The message says why."""


class Attachment:
    """One head, from its attachment until the next one, or until it has been silent for too long.

    `obey` carries a message out. After its end, it neither takes nor sends messages.
    """

    def __init__(self, epoch: int, head: str, obey: "Callable[[Attachment, wire.ToAgent], None]") -> None:
        self.epoch = epoch
        self.head = head
        self.heard_s = asyncio.get_running_loop().time()
        self.over: str | None = None
        self._obey = obey
        self._items: list[wire.FromAgent] = []
        self._news = asyncio.Event()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._next = 0
        self._early: dict[int, bytes] = {}

    def say(self, item: wire.FromAgent) -> None:
        """Put something into the outbox."""
        if self.over is None:
            self._items.append(item)
            self._news.set()

    async def outbox(self) -> AsyncIterator[bytes]:
        """Yield batches of messages for the head. Ends after OUTBOX_ITEMS. Raises Refused at the attachment's end."""
        for _ in range(OUTBOX_ITEMS):
            await self._news.wait()
            if self.over is not None:
                raise Refused(self.over)
            self._news.clear()
            items, self._items = self._items, []
            yield wire.encode(items)

    def take(self, number: int, data: bytes) -> None:
        """Take messages of the head. They are numbered from 0, and may arrive in any order."""
        if self.over is not None:
            return
        self._early[number] = data
        while (due := self._early.pop(self._next, None)) is not None:
            self._next += 1
            self.heard_s = asyncio.get_running_loop().time()
            try:
                messages = wire.to_agent.decode(due)
            except wire.CannotRead as error:  # the calls in it would wait for ever
                self.end(f"a message of the head cannot be read: {error}")
                return
            for message in messages:
                try:
                    self._obey(self, message)
                except Exception:
                    logging.getLogger(__name__).exception("%s cannot be carried out", type(message).__name__)

    def begin(self, number: int, work: Coroutine[None, None, None], ends_with_head: bool = True) -> asyncio.Task[None]:
        """Run a call, and send its outcome. With `ends_with_head`, the end of the attachment cancels it."""
        task = asyncio.create_task(work)
        if ends_with_head:
            self._calls[number] = task
        task.add_done_callback(lambda task: self._ended(number, task))
        return task

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        self._calls.pop(number, None)
        error = EngineDead("the call was cancelled", Death.KILLED) if task.cancelled() else task.exception()
        self.say(wire.Ended(number, wire.failure_of(error) if isinstance(error, Exception) else None))

    def abort(self, number: int) -> None:
        """Cancel a call."""
        if task := self._calls.get(number):
            task.cancel()

    def end(self, why: str) -> None:
        """Cancel the calls and end the outbox."""
        if self.over is None:
            self.over = why
            self._items, self._early = [], {}
            self._news.set()
            for task in self._calls.values():
                task.cancel()
