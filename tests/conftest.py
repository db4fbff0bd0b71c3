"""Settings for all tests: a clock that jumps, for those that ask for it, and no deadlines."""

import asyncio
from collections.abc import Callable, Mapping

import hypothesis
import pytest

from runtime.simulation.virtual_time import VirtualLoop

hypothesis.settings.register_profile("troupe", deadline=None)  # on a busy machine an example can take seconds
hypothesis.settings.load_profile("troupe")

Factory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Factory]:
    """Run tests marked `virtual_time`, and their fixtures, on a loop whose clock jumps; the others in real time."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}
    return {"real": asyncio.new_event_loop}
