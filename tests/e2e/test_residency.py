"""Real vLLM engines sleep, wake and are killed, and every request gets the reply that it would get anyway."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from runtime.control.forecast import Forecast
from runtime.engines import sharing
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.spec import EngineSpec
from runtime.engines.supervised import Patience
from runtime.errors import EngineError
from runtime.residency import catalogue
from runtime.residency.call_times import CallTimes
from runtime.residency.keeper import Keeper
from scripts.tiny_model import write_chat_model
from tests.e2e.conftest import LONG_S
from tests.e2e.test_elastic import numbered_request, tokens

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

NAMES = ("a", "b", "c")
PATIENCE = Patience(hang_s=60, restarts=100, backoff_s=(0, 0.1))


def spec(folder: Path) -> EngineSpec:
    return EngineSpec(
        model=str(write_chat_model(folder / "chat")),
        gpu_memory_utilization=0.7,
        max_model_len=512,
        max_num_seqs=32,
        dtype="float32",
        enforce_eager=True,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "ANSWER_S", 60)  # on a busy machine an engine answers late
        async with Fleet({"a": spec(folder)}, folder, device_bytes=2 << 30) as running:
            needed_bytes = awake_bytes(running.engines["a"])
        device_bytes = int(2.5 * needed_bytes)  # two of the three engines
        specs = dict.fromkeys(NAMES, spec(folder))
        async with Fleet(specs, folder, device_bytes=device_bytes, patience=PATIENCE, one_at_a_time=True) as running:
            yield running


def awake_bytes(engine: EngineHandle) -> int:
    return engine.limits.smallest_bytes


def processes() -> int:
    """Return the number of engine processes that this process has started and that have not ended."""
    count = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            count += "EngineCore" in " ".join(child.cmdline())
    return count


async def test_engines_that_do_not_fit_together_start_and_sleep_without_a_process(fleet: Fleet) -> None:
    assert {engine.stats().state for engine in fleet.engines.values()} == {EngineState.COLD}
    assert sum(fleet.sharing.ledger.held.values()) == 0
    assert processes() == 0
    assert sum(map(awake_bytes, fleet.engines.values())) > fleet.sharing.ledger.budget_bytes


async def test_sleeps_wakes_and_kills_lose_no_request_and_change_no_reply(fleet: Fleet) -> None:
    engines, ledger = fleet.engines, fleet.sharing.ledger
    keeper = Keeper(engines, fleet.sharing, Forecast(), CallTimes(), catalogue.make("lru"))
    async with keeper:
        expected = {number: await tokens(engines["a"], numbered_request(number)) for number in range(10)}
        rng, most_bytes, most_processes = random.Random(5), 0, 0

        async def client(name: str) -> None:
            for _ in range(8):
                await asyncio.sleep(rng.expovariate(2))
                number = rng.randrange(10)
                reply = tokens(engines[name], numbered_request(number))
                assert await asyncio.wait_for(reply, LONG_S) == expected[number]

        async def kill_engines() -> None:
            for name in NAMES:  # each once: a request that is alone in several deaths is quarantined
                await asyncio.sleep(2)
                while engines[name].stats().state not in (EngineState.READY, EngineState.WAKING):  # noqa: ASYNC110 (there is no event to wait for)
                    await asyncio.sleep(0.01)
                engines[name].kill()

        async def watch() -> None:
            nonlocal most_bytes, most_processes
            while True:
                most_bytes = max(most_bytes, sum(ledger.held.values()))
                most_processes = max(most_processes, processes())
                await asyncio.sleep(0.02)

        beside = [asyncio.create_task(kill_engines()), asyncio.create_task(watch())]
        await asyncio.gather(*(client(name) for name in NAMES for _ in range(2)))
        for task in beside:
            task.cancel()
        assert 0 < most_bytes <= ledger.budget_bytes
        assert 0 < most_processes <= 2
        assert keeper.counts.sleeps >= 2
        assert keeper.counts.wakes > keeper.counts.sleeps


async def test_a_model_that_does_not_fit_alone_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine small did not start: it does not fit the device even alone"):
        async with Fleet({"small": spec(tmp_path)}, tmp_path, device_bytes=100 << 20, one_at_a_time=True):
            pass
