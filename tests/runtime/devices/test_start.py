"""If the engines of a device do not start, those of the others are closed, and the error says why."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from runtime.devices.start import _enter_all
from runtime.errors import EngineError

pytestmark = pytest.mark.virtual_time


class Starting:
    """A fleet that takes some seconds to start, or fails after them."""

    def __init__(self, seconds: float, error: str | None = None) -> None:
        self.state = "new"
        self._seconds = seconds
        self._error = error

    async def __aenter__(self) -> "Starting":
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.state = "cancelled"
            raise
        if self._error:
            raise EngineError(self._error)
        self.state = "started"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.state = "closed"


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_the_error_of_the_fleet_that_fails_is_raised_and_the_others_are_closed(failing: int) -> None:
    seconds = [1.0, 2.0, 3.0]
    fleets: Any = [Starting(s, "no driver" if n == failing else None) for n, s in enumerate(seconds)]
    with pytest.raises(EngineError, match="no driver"):
        async with AsyncExitStack() as owned:
            await _enter_all(owned, fleets)
    assert [fleet.state for fleet in fleets] == ["closed"] * failing + ["new"] + ["cancelled"] * (2 - failing)


async def test_a_cancelled_start_closes_what_has_started() -> None:
    fleets: Any = [Starting(1), Starting(100)]

    async def start() -> None:
        async with AsyncExitStack() as owned:
            await _enter_all(owned, fleets)

    starting = asyncio.create_task(start())
    await asyncio.sleep(2)
    starting.cancel()
    await asyncio.wait([starting])
    assert starting.cancelled()
    assert [fleet.state for fleet in fleets] == ["closed", "cancelled"]
