"""Waits for processes of tools to end."""

import asyncio
import time
from collections.abc import Callable, Iterable

import psutil

LONG_S = 60
"""Bounds waits for what takes a fraction of a second on an idle machine."""


def lives(pid: int) -> bool:
    """Return True if a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition. Fail if it takes too long."""
    end_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end_s, "the condition was not met in time"
        await asyncio.sleep(0.02)


async def all_end(pids: Iterable[int]) -> None:
    """Wait until none of the processes runs."""
    for pid in list(pids):
        await until(lambda pid=pid: not lives(pid))  # type: ignore[misc]  # mypy cannot infer this lambda


def below(pid: int) -> set[int]:
    """Return the PIDs of all processes that come of a process."""
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}
