"""An event loop in virtual time: instead of sleeping, it advances its clock to the next timer.

Unmodified asyncio code runs on it, in the right order and as fast as the processor allows. It must not wait for a
thread, a process or a socket, because virtual time would pass without them.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """A selector that advances the clock to the loop's next timer instead of waiting for it."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation is deadlocked: every task waits, and no timer is left to wake one")
        self.loop.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 s and is advanced by its selector."""

    def __init__(self) -> None:
        self.now_s = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time. Raises RuntimeError if every task waits and there is no timer."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
