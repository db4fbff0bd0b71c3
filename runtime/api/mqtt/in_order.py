"""Concurrent tasks whose completions are reported in the order in which the tasks were added."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Pending(Generic[T]):
    item: T
    task: asyncio.Task[Any]


class InOrder(Generic[T]):
    """A queue of items, each with its task, that reports an item once its task and all earlier tasks have succeeded.

    `on_done` is called with each reported item. A task that fails or is cancelled stops all further reports; the owner
    of the tasks handles the failure.
    """

    def __init__(self, on_done: Callable[[T], None]) -> None:
        self._on_done = on_done
        self._pending: deque[_Pending[T]] = deque()

    def add(self, item: T, task: asyncio.Task[Any]) -> None:
        """Append an item and its task."""
        self._pending.append(_Pending(item, task))
        task.add_done_callback(self._report)

    async def wait_for_room(self, limit: int) -> None:
        """Wait until the task of the `limit`-th newest item has ended, if at least `limit` items are pending."""
        if len(self._pending) >= limit:
            await asyncio.wait([self._pending[len(self._pending) - limit].task])

    def _report(self, _: asyncio.Task[Any]) -> None:
        while self._pending:
            task = self._pending[0].task
            if not task.done() or task.cancelled() or task.exception() is not None:
                return
            self._on_done(self._pending.popleft().item)
