"""An engine under supervision, and what its supervisor did."""

from collections.abc import AsyncIterator

import pytest

from runtime.engines.replicas import Replicas
from runtime.engines.supervised import SupervisedEngine
from tests.runtime.engines.supervision import QUICK, Made


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
async def engine(made: Made) -> AsyncIterator[SupervisedEngine]:
    async with SupervisedEngine("e", made.make, made.states.append, QUICK) as supervised:
        yield supervised


@pytest.fixture
def replicas(engine: SupervisedEngine) -> Replicas:
    return Replicas("e", [engine])
