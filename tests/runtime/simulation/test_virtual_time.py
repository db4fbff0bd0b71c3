"""Virtual time advances to the next timer, in order, and a deadlock is an error."""

import asyncio

import pytest

from runtime.simulation import virtual_time


def test_timers_fire_in_order_without_real_waiting() -> None:
    fired: list[tuple[float, str]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        fired.append((asyncio.get_running_loop().time(), name))

    async def work() -> None:
        await asyncio.gather(wait("b", 3600), wait("a", 60), wait("c", 3600.5))

    virtual_time.run(work())
    assert fired == [(60, "a"), (3600, "b"), (3600.5, "c")]


def test_timeouts_use_virtual_time() -> None:
    async def work() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(120):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert virtual_time.run(work()) == 120


def test_deadlock_raises() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="deadlocked"):
        virtual_time.run(work())
