"""Time passes only for those who wait, in order, and a simulation that nobody can go on with ends."""

import asyncio

import pytest

from runtime.simulation import virtual_time


def test_an_hour_takes_no_time_and_things_happen_in_order() -> None:
    happened: list[tuple[float, str]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        happened.append((asyncio.get_running_loop().time(), name))

    async def work() -> None:
        await asyncio.gather(wait("b", 3600), wait("a", 60), wait("c", 3600.5))

    virtual_time.run(work())
    assert happened == [(60, "a"), (3600, "b"), (3600.5, "c")]


def test_timeouts_come_in_virtual_time() -> None:
    async def work() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(120):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert virtual_time.run(work()) == 120


def test_waiting_for_what_never_comes_is_an_error() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="never happen"):
        virtual_time.run(work())
