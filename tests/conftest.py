"""What every test may ask for: a clock that jumps instead of passing."""

import asyncio
from collections.abc import Callable, Mapping

import pytest

from runtime.simulation.virtual_time import VirtualLoop

Factory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Factory]:
    """Run tests marked `virtual_time`, and their fixtures, on a loop whose clock jumps; the others in real time."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}
    return {"real": asyncio.new_event_loop}
