"""Work that is done side by side and reported in the order in which it began."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class InOrder(Generic[T]):
    """Calls `passed` with an item once the item's task, and the tasks of all items before it, have succeeded.

    The first task that fails or is cancelled stops the reports: whoever owns the tasks sees to it.
    """

    def __init__(self, passed: Callable[[T], None]) -> None:
        self._passed = passed
        self._under_way: deque[tuple[T, asyncio.Task[Any]]] = deque()

    def add(self, item: T, task: asyncio.Task[Any]) -> None:
        """Put an item after those that are under way."""
        self._under_way.append((item, task))
        task.add_done_callback(self._report)

    async def room(self, most: int) -> None:
        """Wait until the item `most` places from the end has ended, if there are so many."""
        if len(self._under_way) >= most:
            await asyncio.wait([self._under_way[len(self._under_way) - most][1]])

    def _report(self, _: asyncio.Task[Any]) -> None:
        while self._under_way:
            item, task = self._under_way[0]
            if not task.done() or task.cancelled() or task.exception() is not None:
                return
            self._under_way.popleft()
            self._passed(item)
