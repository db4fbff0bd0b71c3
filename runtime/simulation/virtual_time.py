"""An event loop whose clock jumps: whatever sleeps is woken at once, in the right order, at the time it asked for.

Code over it is the real one; only engines and devices are modelled. Nothing in it may wait for a thread, a process or a
socket: time would pass without them.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Where a loop waits for its next timer: here that time passes at once."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that will never happen")
        self.loop.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 0 s."""

    def __init__(self) -> None:
        self.now_s = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end in virtual time. Raises RuntimeError when everybody waits for something that cannot come."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
