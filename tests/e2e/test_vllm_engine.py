"""Real vLLM keeps the contract of EngineHandle for streams, refusals, aborts, seeds and schemas."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import ByteSize

from agents.arithmetic import oracle, sampling, scratchpad
from agents.role import Message, read_json
from agents.roles.critic import Critic
from agents.tasks import CritiqueTask, Step
from runtime import config
from runtime.engines.fleet import Fleet
from runtime.engines.handle import EngineState
from runtime.engines.request import GenerateRequest
from runtime.engines.spec import EngineSpec
from runtime.errors import EngineDead, EngineError, RequestRefused
from runtime.events import EngineChanged, Event
from scripts.drill_residency import processes
from scripts.tiny_model import write_chat_model
from tests.e2e.conftest import LONG_S

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

STEP = scratchpad.step_prompt(347, "+", 589)


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> AsyncIterator[Fleet]:
    """The shipped solver, and a small chat model with random weights, which generates arbitrary bytes."""
    folder = tmp_path_factory.mktemp("run")
    chat = EngineSpec(model=str(write_chat_model(folder / "chat")), max_model_len=10_000, dtype="float32",
                      enforce_eager=True, kv_cache_memory_bytes=ByteSize(64 << 20))  # fmt: skip
    specs = {"solver": config.load("embedded").engines["solver"], "chat": chat}
    async with Fleet(specs, folder / "logs", lambda *change: events.append(EngineChanged(*change)), 2 << 30) as running:
        yield running


def request(content: str, **changes: Any) -> GenerateRequest:
    values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 40, **changes}
    return GenerateRequest(f"r{random.random()}", (Message("user", content),), **values)


async def text(fleet: Fleet, engine: str, request: GenerateRequest) -> str:
    return "".join([chunk.text async for chunk in fleet.engines[engine].generate(request)]).strip()


async def test_start_up_states_are_reported(fleet: Fleet, events: list[Event]) -> None:
    states = [(event.engine, event.state) for event in events if isinstance(event, EngineChanged)]
    assert states[:2] == [("solver", EngineState.STARTING), ("chat", EngineState.STARTING)]
    for name in ("solver", "chat"):
        own = [state for engine, state in states if engine == name]
        assert own == [EngineState.STARTING, EngineState.LOADING, EngineState.LOADED, EngineState.READY]


async def test_a_cancelled_start_ends_at_once_however_long_the_weights_take(tmp_path: Path) -> None:
    before = {process.pid for process in processes()}
    loading = asyncio.Event()

    def note(_name: str, state: EngineState, _s: float) -> None:
        if state is EngineState.LOADING:
            loading.set()

    starting = asyncio.create_task(
        Fleet({"solver": config.load("embedded").engines["solver"]}, tmp_path, note).__aenter__()
    )
    await loading.wait()
    [process] = [process for process in processes() if process.pid not in before]
    process.suspend()  # it loads for ever
    starting.cancel()
    done, _ = await asyncio.wait([starting], timeout=LONG_S)
    if not done:
        process.resume()
    assert done
    assert starting.cancelled()
    assert {process.pid for process in processes()} == before


async def test_tokens_stream_with_their_times(fleet: Fleet) -> None:
    chunks = [chunk async for chunk in fleet.engines["solver"].generate(request(STEP))]
    assert "".join(chunk.text for chunk in chunks).strip() == oracle.reply(STEP)
    tokens = sum(len(chunk.token_ids) for chunk in chunks)  # on a busy machine vLLM joins tokens in one chunk
    assert tokens == len(oracle.reply(STEP).split()) + 1  # and the end token
    assert len(chunks) > 1
    assert [chunk.time_s for chunk in chunks] == sorted(chunk.time_s for chunk in chunks)
    assert chunks[-1].finish == "stop"
    assert chunks[0].prompt_tokens == len(STEP.split()) + 2  # and the tokens that start the prompt and the reply


async def test_concurrent_requests_get_the_same_replies_as_single_ones(fleet: Fleet) -> None:
    rng = random.Random(1)
    prompts = [scratchpad.step_prompt(*sampling.draw_step(rng)) for _ in range(100)]
    together = await asyncio.gather(*(text(fleet, "solver", request(p)) for p in prompts))
    alone = [await text(fleet, "solver", request(p)) for p in prompts[:10]]
    assert list(together[:10]) == alone
    assert sum(reply == oracle.reply(p) for p, reply in zip(prompts, together, strict=True)) >= 98


async def test_a_prompt_that_is_too_long_is_refused_and_the_engine_keeps_serving(fleet: Fleet) -> None:
    with pytest.raises(EngineError, match="solver refused"):
        await text(fleet, "solver", request("1 " * 500))
    assert await text(fleet, "solver", request(STEP)) == oracle.reply(STEP)


async def test_too_many_stop_tokens_beside_min_tokens_are_refused(fleet: Fleet) -> None:
    many = {"stop_token_ids": list(range(129))}
    await text(fleet, "chat", request("hello", max_tokens=3, sampling_params=many))
    with pytest.raises(RequestRefused, match=r"^stop_token_ids: at most 12[78] .* min_tokens; got 129"):
        await text(fleet, "chat", request("hello", max_tokens=3, sampling_params={**many, "min_tokens": 2}))


@pytest.mark.parametrize("most", [2**31, 10**30])
async def test_max_tokens_beyond_32_bits_means_as_many_as_fit(fleet: Fleet, most: int) -> None:
    assert await text(fleet, "solver", request(STEP, max_tokens=most)) == oracle.reply(STEP)


async def test_closing_a_stream_early_aborts_its_request(fleet: Fleet) -> None:
    engine = fleet.engines["chat"]
    stream = engine.generate(request("hello", max_tokens=1500, temperature=1.0))
    await anext(stream)
    assert engine.stats().running == 1
    await stream.aclose()
    await text(fleet, "chat", request("hello", max_tokens=2))
    assert engine.stats().running == 0


async def test_a_seed_repeats_a_sampled_reply(fleet: Fleet) -> None:
    def sampled(seed: int) -> GenerateRequest:
        return request("hello", temperature=1.0, seed=seed)

    first = await text(fleet, "chat", sampled(1))
    crowd = await asyncio.gather(*(text(fleet, "chat", sampled(seed)) for seed in range(8)))
    assert crowd[1] == first
    assert len(set(crowd)) == 8


async def test_a_schema_makes_even_random_weights_reply_in_json(fleet: Fleet) -> None:
    schema = {
        "type": "object",
        "properties": {"accepted": {"type": "boolean"}, "reason": {"type": "string", "maxLength": 20}},
        "required": ["accepted", "reason"],
        "additionalProperties": False,
    }
    replies = await asyncio.gather(
        *(text(fleet, "chat", request("x", temperature=1.0, seed=s, schema=schema, max_tokens=200)) for s in range(20))
    )
    parsed = [read_json(reply) for reply in replies]
    assert all(isinstance(p["accepted"], bool) and isinstance(p["reason"], str) for p in parsed)
    assert len({str(p) for p in parsed}) > 1


async def test_waiting_requests_are_admitted_by_priority_then_job_age(fleet: Fleet) -> None:
    engine = fleet.engines["chat"]
    grant = engine.stats().grant
    assert grant is not None
    served: list[str] = []

    async def ask(name: str, priority: int, since_s: float, tokens: int = 4) -> None:
        to_send = request(
            name, max_tokens=tokens, sampling_params={"ignore_eos": True}, priority=priority, since_s=since_s
        )
        async for _ in engine.generate(to_send):
            pass
        served.append(name)

    await engine.resize(replace(grant, max_active_seqs=1))
    try:
        first = asyncio.create_task(ask("runs", 5, 9, tokens=200))
        while not engine.stats().running:  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.005)
        await asyncio.gather(first, ask("young", 5, 3), ask("old", 5, 1), ask("urgent", 1, 5))
    finally:
        await engine.resize(grant)
    assert served == ["runs", "urgent", "old", "young"]


async def test_a_general_role_parses_the_reply_of_any_chat_model(fleet: Fleet) -> None:
    role = Critic()
    task = CritiqueTask("1+2", Step(name="1", instruction="add 1 and 2"), "3")
    tokens = 8192  # enough, although each token of this model is one byte
    to_send = GenerateRequest("critic", tuple(role.messages(task)), 0.0, 1.0, tokens, schema=role.schema(task))
    role.parse(await text(fleet, "chat", to_send), task)


async def test_stats_count_requests_and_tokens(fleet: Fleet) -> None:
    before = fleet.engines["solver"].stats()
    await text(fleet, "solver", request(STEP))
    after = fleet.engines["solver"].stats()
    assert after.requests == before.requests + 1
    assert after.completion_tokens == before.completion_tokens + len(oracle.reply(STEP).split()) + 1
    assert after.state is EngineState.READY


async def test_a_closed_engine_refuses_requests(fleet: Fleet) -> None:
    engine = fleet.engines["chat"]
    await engine.close()
    await engine.close()
    with pytest.raises(EngineDead, match="closed"):
        await text(fleet, "chat", request("hello"))
