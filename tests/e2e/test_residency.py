"""Real vLLM engines sleep, wake and are killed, and every request gets the reply that it would get anyway."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from runtime.engines import sharing
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineState
from runtime.errors import EngineError
from scripts.drill_residency import drill, oversubscribed, processes, small_engine
from tests.e2e.conftest import LONG_S

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "ANSWER_S", 60)  # on a busy machine an engine answers late
        async with oversubscribed(tmp_path_factory.mktemp("run")) as running:
            yield running


async def test_engines_that_do_not_fit_together_start_and_sleep_without_a_process(fleet: Fleet) -> None:
    assert {engine.stats().state for engine in fleet.engines.values()} == {EngineState.COLD}
    assert sum(fleet.sharing.ledger.held.values()) == 0
    assert processes() == []
    needed_bytes = sum(engine.limits.smallest_bytes for engine in fleet.engines.values())
    assert needed_bytes > fleet.sharing.ledger.budget_bytes


async def test_sleeps_wakes_and_kills_lose_no_request_and_change_no_reply(fleet: Fleet) -> None:
    outcome = await asyncio.wait_for(drill(fleet, sleeps=8), 4 * LONG_S)
    assert (outcome.wrong, outcome.requests > 0, outcome.kills > 0) == (0, True, True)
    assert outcome.wakes >= outcome.sleeps >= 8
    assert 0 < outcome.most_bytes <= outcome.budget_bytes
    assert 0 < outcome.most_processes <= 2


async def test_a_model_that_does_not_fit_alone_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine small did not start: it does not fit the device even alone"):
        async with Fleet({"small": small_engine(tmp_path)}, tmp_path, device_bytes=100 << 20, one_at_a_time=True):
            pass
