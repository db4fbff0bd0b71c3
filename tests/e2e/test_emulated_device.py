"""Real vLLM engines on the CPU take turns on an emulated device, for at least their step times."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineState
from runtime.engines.spec import EngineSpec
from runtime.engines.step_time import StepTime
from runtime.engines.supervised import Patience
from runtime.engines.vllm_engine import VllmEngine
from scripts.tiny_model import write_chat_model
from tests.e2e import traced_worker
from tests.e2e.test_elastic import all_tokens, numbered_request, tokens
from tests.e2e.traced_worker import Step

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

TIMES = {"fast": StepTime(20), "slow": StepTime(100, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(folder: Path) -> AsyncIterator[Fleet]:
    """Three engines of one chat model with random weights: two share an emulated device, `free` uses none."""
    spec = EngineSpec(
        model=str(write_chat_model(folder / "chat")),
        gpu_memory_utilization=0.3,
        max_model_len=512,
        max_num_seqs=32,
        dtype="float32",
        enforce_eager=True,
    )
    configure = VllmEngine._config

    def configure_traced(engine: VllmEngine) -> Any:
        config = configure(engine)
        config.parallel_config.worker_cls = traced_worker.NAME
        return config

    patience = Patience(hang_s=60, restarts=10, backoff_s=(0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmEngine, "_config", configure_traced)
        specs = dict.fromkeys(("fast", "slow", "free"), spec)
        async with Fleet(specs, folder, device_bytes=2 << 30, patience=patience, step_times=TIMES) as running:
            yield running


def steps_since(folder: Path, since_s: float) -> Sequence[Step]:
    """Return the steps on the emulated device that were asked for since a time."""
    return [step for step in traced_worker.read(folder) if step.engine in TIMES and step.asked_s >= since_s]


async def test_replies_are_those_of_an_engine_without_emulation_and_steps_never_overlap(
    fleet: Fleet, folder: Path
) -> None:
    since_s = time.monotonic()
    fast, slow, free = await asyncio.gather(*(all_tokens(fleet.engines[name], 12) for name in (*TIMES, "free")))
    assert fast == slow == free

    steps = steps_since(folder, since_s)
    assert {step.engine for step in steps} == set(TIMES)
    for step, following in pairwise(steps):
        assert step.computed_s is not None
        assert step.computed_s <= following.begun_s, (step, following)
    seconds = [TIMES[step.engine].seconds(step.sequences) for step in steps]
    for step, least_s in zip(steps, seconds, strict=True):
        assert step.ended_s is not None
        assert step.ended_s - step.asked_s >= least_s
    whole_s = max(step.ended_s or 0 for step in steps) - min(step.asked_s for step in steps)
    assert whole_s >= sum(seconds)  # the padding of a step does not overlap with another step either


async def test_engines_take_turns_while_both_have_work(fleet: Fleet, folder: Path) -> None:
    """The slow engine uses the device five times as long as the other one, and still every other step is its own."""
    since_s = time.monotonic()
    await asyncio.gather(*(tokens(fleet.engines[name], numbered_request(1, max_tokens=20)) for name in TIMES))
    names = [step.engine for step in steps_since(folder, since_s)]
    both = names[max(map(names.index, TIMES)) : len(names) - max(map(names[::-1].index, TIMES))]
    assert len(both) >= 30
    assert sum(first == second for first, second in pairwise(both)) <= 3, names


async def test_an_engine_killed_in_a_step_does_not_stop_the_other(fleet: Fleet, folder: Path) -> None:
    fast, slow = fleet.engines["fast"], fleet.engines["slow"]
    undisturbed = await tokens(slow, numbered_request(1, max_tokens=20))
    since_s = time.monotonic()
    interrupted = asyncio.create_task(tokens(slow, numbered_request(1, max_tokens=20)))
    running = asyncio.create_task(tokens(fast, numbered_request(2, max_tokens=400)))
    while not _is_in_a_step("slow", steps_since(folder, since_s)):  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.005)
    slow.kill()
    killed_s = time.monotonic()
    while slow.stats().state is EngineState.READY:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.001)
    await running
    killed = [step for step in steps_since(folder, since_s) if step.engine == "slow" and step.ended_s is None]
    assert [step.begun_s < killed_s for step in killed] == [True], "no step was interrupted: this test shows nothing"
    later = [step for step in steps_since(folder, since_s) if step.engine == "fast" and step.begun_s > killed_s]
    assert len(later) > 5
    assert await interrupted == undisturbed  # the restarted engine takes turns too
    assert {step.engine for step in steps_since(folder, killed_s)} == set(TIMES)


def _is_in_a_step(engine: str, steps: Sequence[Step]) -> bool:
    return bool(steps) and steps[-1].engine == engine and steps[-1].ended_s is None
