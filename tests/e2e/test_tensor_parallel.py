"""Real engines with two ranks each share a group of two emulated devices."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import yaml

from agents.role import Message
from runtime import config
from runtime.assembly import RunningTeam, start_team
from runtime.engines import sharing
from runtime.engines.fleet import Fleet
from runtime.engines.grant import Deferred, Grant, Rejected
from runtime.engines.handle import EngineState
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.spec import EngineSpec
from runtime.jobs.team import assemble
from scripts.drill_residency import processes
from scripts.tiny_model import write_chat_model
from tests.e2e.conftest import LONG_S, lives

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


def engine(model: Path, **further: object) -> dict[str, object]:
    return {
        "model": str(model),
        "max_model_len": 512,
        "max_num_seqs": 8,
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.4,
        **further,
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningTeam]:
    folder = tmp_path_factory.mktemp("run")
    file = folder / "team.yaml"
    ranks = engine(model, vllm={"tensor_parallel_size": 2})
    team = {"solver": {"role": "solver", "engine": "one"}, "critic": {"role": "critic", "engine": "two"}}
    settings = {"devices": [[0, 1]], "device": {"memory_bytes": "2GiB"}, "engines": {"one": ranks, "two": ranks}}
    file.write_text(yaml.safe_dump({**settings, "team": team, "workflow": {"name": "solo"}}))
    found = config.load(str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "ANSWER_S", 60)  # on a busy machine an engine answers late
        async with start_team(found, assemble(found), folder) as started:
            yield started
    assert processes() == []


async def replies(generate: Callable[[GenerateRequest], AsyncIterator[Chunk]], count: int) -> list[list[int]]:
    """Return the tokens of replies that are generated at the same time."""

    async def reply(number: int) -> list[int]:
        message = Message("user", f"hello {number}")
        request = GenerateRequest(f"r{number}", (message,), temperature=0.0, top_p=1.0, max_tokens=12)
        return [token async for chunk in generate(request) for token in chunk.token_ids]

    return await asyncio.gather(*(reply(number) for number in range(count)))


async def test_ranks_say_what_one_process_says(running: RunningTeam, model: Path, tmp_path: Path) -> None:
    alone = EngineSpec.model_validate(engine(model))
    async with Fleet({"alone": alone}, tmp_path, device_bytes=2 << 30) as fleet:
        expected = await replies(fleet.engines["alone"].generate, 3)
        block_bytes = fleet.engines["alone"].limits.block_bytes
    said = await replies(partial(running.generate, "one"), 3)
    assert said == expected
    limits = running.devices["0+1"].engines["one"].limits
    assert limits.block_bytes * 2 == block_bytes  # each rank holds half of the heads


async def test_all_ranks_follow_a_resize_while_they_generate(running: RunningTeam) -> None:
    expected = await replies(partial(running.generate, "one"), 6)
    replica = running.devices["0+1"].engines["one"]
    limits = replica.limits
    talking = asyncio.create_task(replies(partial(running.generate, "one"), 6))
    for kv_bytes in (limits.kv_floor_bytes, 64 * MIB, limits.kv_floor_bytes, 32 * MIB):
        grant = Grant(limits.share(kv_bytes), limits.seqs_ceiling, limits.step_tokens_ceiling)
        outcome = await replica.resize(grant)
        assert not isinstance(outcome, Rejected), outcome.reason
        if isinstance(outcome, Deferred):
            await outcome.settled
        await asyncio.sleep(0.05)
    assert await talking == expected


async def test_an_engine_of_a_group_sleeps_and_wakes(running: RunningTeam) -> None:
    expected = await replies(partial(running.generate, "one"), 3)
    replica = running.devices["0+1"].engines["one"]
    pid = replica.stats().pid
    assert pid is not None
    ranks = psutil.Process(pid).children()
    await replica.sleep()
    assert replica.stats().state is EngineState.COLD
    assert not any(map(lives, ranks))
    await replica.wake()
    assert await replies(partial(running.generate, "one"), 3) == expected


@pytest.mark.parametrize("count", [1, 3])  # an engine that crashed would convict a single request
async def test_a_killed_rank_costs_no_reply(running: RunningTeam, count: int) -> None:
    expected = await replies(partial(running.generate, "one"), count)
    talking = asyncio.create_task(replies(partial(running.generate, "one"), count))
    async with asyncio.timeout(LONG_S):
        while not running.engines["one"].stats().running:  # noqa: ASYNC110  no event
            await asyncio.sleep(0)
    pid = running.engines["one"].stats().pid
    assert pid is not None
    ranks = psutil.Process(pid).children()
    assert len(ranks) == 2
    ranks[1].kill()
    assert await talking == expected
    assert running.engines["one"].stats().pid != pid
    assert not any(map(lives, ranks))


async def test_a_closed_engine_leaves_no_rank(model: Path, tmp_path: Path) -> None:
    spec = EngineSpec.model_validate(engine(model, vllm={"tensor_parallel_size": 2}))
    before = shared_memory()
    async with Fleet({"one": spec}, tmp_path, device_bytes=2 << 30, device=(0, 1)) as fleet:
        pid = fleet.engines["one"].stats().pid
        assert pid is not None
        ranks = psutil.Process(pid).children()
        assert len(ranks) == 2
    assert not any(map(lives, ranks))
    assert shared_memory() <= before


def shared_memory() -> set[str]:
    return {path.name for pattern in ("vllm_dist_*", "psm_*") for path in Path("/dev/shm").glob(pattern)}
