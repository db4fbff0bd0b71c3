"""Real vLLM engines serve every request while their grants change and while they are killed."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import pytest_asyncio

from agents.role import Message
from runtime.engines import sharing
from runtime.engines.fleet import Fleet
from runtime.engines.grant import Applied, Deferred, Grant, Rejected, Superseded
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.replicas import Replicas
from runtime.engines.request import GenerateRequest
from runtime.engines.spec import EngineSpec
from runtime.engines.supervised import Patience, SupervisedEngine
from runtime.errors import EngineError, RequestQuarantined
from runtime.events import EngineChanged, Event
from scripts.measure_elastic import engine_process
from scripts.tiny_model import write_chat_model
from tests.e2e.conftest import LONG_S

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

MIB = 1 << 20
DEVICE = 2 << 30
WORDS = ["hello", "world", "plan", "solve", "critique", "answer"]
SCHEMA = {
    "type": "object",
    "properties": {"accepted": {"type": "boolean"}, "reason": {"type": "string", "maxLength": 40}},
    "required": ["accepted", "reason"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory, events: list[Event]) -> AsyncIterator[Fleet]:
    """Two engines of one chat model with random weights, one with prefix caching and one without."""
    folder = tmp_path_factory.mktemp("run")
    spec = EngineSpec(
        model=str(write_chat_model(folder / "chat")),
        gpu_memory_utilization=0.4,
        max_model_len=512,
        max_num_seqs=32,
        dtype="float32",
        enforce_eager=True,
    )
    specs = {"cached": spec, "plain": spec.model_copy(update={"vllm": {"enable_prefix_caching": False}})}
    patience = Patience(hang_s=15, restarts=100, backoff_s=(0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "ANSWER_S", 60)  # on a busy machine an engine answers late
        async with Fleet(
            specs, folder / "logs", lambda *change: events.append(EngineChanged(*change)), DEVICE, patience
        ) as running:
            yield running


def numbered_request(number: int, **changes: Any) -> GenerateRequest:
    """Return a request that depends on the number only.

    Every fifth must match a schema, and every second starts with the same text. Only the ids differ between two calls.
    """
    rng = random.Random(number)
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    beginning = "You are one of a team of agents that works problems together. " * 2 if number % 2 else ""
    values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 20 + number % 60}
    if number % 5 == 0:
        values |= {"schema": SCHEMA, "max_tokens": 100}
    content = beginning + words
    return GenerateRequest(f"{number}/{time.monotonic_ns()}", (Message("user", content),), **(values | changes))


@cache
def served(engine: EngineHandle) -> Replicas:
    """Return an engine whose requests are sent again when it dies."""
    return Replicas(engine.name, [engine])


async def tokens(engine: EngineHandle, request: GenerateRequest) -> tuple[int, ...]:
    return tuple([t async for chunk in served(engine).generate(request) for t in chunk.token_ids])


async def all_tokens(engine: EngineHandle, count: int) -> list[tuple[int, ...]]:
    return await asyncio.gather(*(tokens(engine, numbered_request(number)) for number in range(count)))


async def until_running(engine: EngineHandle) -> None:
    """Wait until the engine runs requests."""
    while not engine.stats().running:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.005)


def kv_grant(engine: EngineHandle, kv_cache_bytes: int, seqs: int = 32, step_tokens: int = 2048) -> Grant:
    return Grant(engine.limits.share(kv_cache_bytes) + 1e-9, seqs, step_tokens)


async def test_engines_that_start_together_hold_exactly_their_shares(fleet: Fleet) -> None:
    for engine in fleet.engines.values():
        limits, stats = engine.limits, engine.stats()
        assert limits.device_bytes == DEVICE
        assert 0 <= limits.kv_cache_bytes(0.4) - stats.kv_cache_bytes < limits.kv_floor_bytes
        assert limits.fixed_bytes > 256 * MIB
    held = fleet.sharing.ledger.held
    assert held == {"cached": int(0.4 * DEVICE), "plain": int(0.4 * DEVICE)}


async def test_stats_name_the_process_of_the_engine(fleet: Fleet) -> None:
    for name, engine in fleet.engines.items():
        assert engine.stats().pid == engine_process(fleet, name).pid


@pytest.mark.parametrize("name", ["cached", "plain"])
async def test_output_is_identical_under_random_grants(fleet: Fleet, name: str) -> None:
    engine = fleet.engines[name]
    floor, before = engine.limits.kv_floor_bytes, engine.stats().grant
    assert before is not None
    undisturbed = await all_tokens(engine, 150)
    rng = random.Random(0)
    outcomes: list[tuple[float, Applied | Deferred | Rejected]] = []

    async def shake() -> None:
        while True:
            grant = kv_grant(
                engine, rng.choice([floor, 2 * floor, 4 * floor, 32 * floor]), rng.choice([0, 1, 8, 32]),
                rng.choice([16, 256, engine.limits.step_tokens_ceiling]),
            )  # fmt: skip
            grace_s = rng.choice([0, 0, 0.05])
            outcomes.append((grace_s, await engine.resize(grant, grace_s)))
            await asyncio.sleep(0.01)

    shaking = asyncio.create_task(shake())
    while len(outcomes) <= 30:  # one round, or more if a busy machine delays the resizes
        assert await all_tokens(engine, 150) == undisturbed
        assert not shaking.done(), shaking
    shaking.cancel()
    await asyncio.wait([shaking])
    assert isinstance(await engine.resize(before), Applied)  # the last grant may have paused the engine
    assert not any(isinstance(outcome, Rejected) for _, outcome in outcomes)
    assert all(isinstance(outcome, Applied) for grace_s, outcome in outcomes if grace_s == 0)
    applied = [outcome for _, outcome in outcomes if isinstance(outcome, Applied)]
    assert sum(outcome.preempted for outcome in applied) > 0, (
        "no request was preempted, so that this test shows nothing"
    )


async def test_shrink_waits_for_its_grace_and_a_newer_one_supersedes_it(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    floor = engine.limits.kv_floor_bytes
    await engine.resize(kv_grant(engine, 32 * floor))
    work = asyncio.create_task(all_tokens(engine, 100))
    while engine.stats().kv_cache_usage < 0.1:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.005)
    first = await engine.resize(kv_grant(engine, floor), grace_s=30)
    assert isinstance(first, Deferred)
    assert first.held_bytes > 0
    second = await engine.resize(kv_grant(engine, 2 * floor), grace_s=0.2)
    assert isinstance(await first.settled, Superseded)
    assert isinstance(second, Deferred)
    third = await second.settled
    assert not work.done()
    assert isinstance(third, Applied)
    assert third.kv_cache_bytes <= 2 * floor
    assert third.preempted == 0 or third.seconds > 0.15  # no request was preempted within the grace
    await work


async def test_paused_engine_finishes_what_it_runs_admits_nothing_and_does_not_spin(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    grant = kv_grant(engine, 32 * engine.limits.kv_floor_bytes)
    await engine.resize(grant)
    begun = [asyncio.Event() for _ in range(8)]

    async def tokens_after_begun(number: int) -> tuple[int, ...]:
        reply: list[int] = []
        async for chunk in served(engine).generate(numbered_request(number)):
            begun[number].set()
            reply += chunk.token_ids
        return tuple(reply)

    running = [asyncio.create_task(tokens_after_begun(number)) for number in range(8)]
    await asyncio.gather(*(each.wait() for each in begun))  # on a busy machine, some are admitted long after others
    await engine.resize(replace(grant, max_active_seqs=0))
    held_back = [asyncio.create_task(tokens(engine, numbered_request(number))) for number in range(8)]
    await asyncio.wait(running, timeout=LONG_S)
    assert all(task.done() for task in running)
    before, seconds = engine_process(fleet, "plain").cpu_times(), 2.0
    await asyncio.sleep(seconds)
    after = engine_process(fleet, "plain").cpu_times()
    assert not any(task.done() for task in held_back)
    assert engine.stats().running == 0
    assert after.user + after.system - before.user - before.system < 0.2 * seconds
    held_back.pop().cancel()  # a caller may leave meanwhile
    await engine.resize(grant)
    replies = [await task for task in held_back]
    assert replies == [task.result() for task in running][: len(replies)]


async def test_preempted_requests_are_computed_again_and_their_replies_stay_the_same(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    grant = kv_grant(engine, 32 * engine.limits.kv_floor_bytes)
    await engine.resize(grant)
    undisturbed = await all_tokens(engine, 40)
    preemptions = engine.stats().preemptions
    work = asyncio.create_task(all_tokens(engine, 40))
    await until_running(engine)
    stopped = kv_grant(engine, engine.limits.kv_floor_bytes, seqs=0)
    outcome = await engine.resize(replace(stopped, preempt=True), grace_s=30)
    assert isinstance(outcome, Applied)  # at once, whatever the grace period
    assert outcome.preempted > 0
    await asyncio.sleep(0.5)
    assert not work.done()
    await engine.resize(grant)
    assert await work == undisturbed
    assert engine.stats().preemptions >= preemptions + outcome.preempted


async def test_work_counts_steps_their_time_sequences_and_prompt_tokens(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    await engine.resize(kv_grant(engine, 32 * engine.limits.kv_floor_bytes))
    before, began_s = engine.stats(), time.monotonic()
    replies = await all_tokens(engine, 20)
    took_s, after = time.monotonic() - began_s, engine.stats()
    steps = after.work.steps - before.work.steps
    sequences = after.work.sequences - before.work.sequences
    assert max(map(len, replies)) <= steps < sum(map(len, replies))
    assert 0.3 * took_s < after.work.busy_s - before.work.busy_s < took_s
    # A prompt's last step generates its first token, so that a reply of n tokens is in n steps.
    assert sequences == pytest.approx(sum(map(len, replies)), rel=0.1)
    computed = after.work.prompt_tokens - before.work.prompt_tokens
    assert computed == pytest.approx(after.prompt_tokens - before.prompt_tokens, rel=0.1)


async def test_impossible_grants_are_rejected_and_change_nothing(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    before = engine.stats().grant
    floor = engine.limits.share(engine.limits.kv_floor_bytes)
    for grant, reason in [
        (Grant(floor * 0.99, 32, 2048), "floor"),
        (Grant(-1, 32, 2048), "floor"),
        (Grant(float("nan"), 32, 2048), "floor"),
        (Grant(3, 32, 2048), "ceiling"),
        (Grant(0.4, 33, 2048), "max_active_seqs 33 is not within 0 to 32"),
        (Grant(0.4, 32, 0), "max_step_tokens 0 is not within 1 to"),
        (Grant(0.4, 32, 2048, preempt=True), "preempt is possible only with max_active_seqs 0"),
    ]:
        outcome = await engine.resize(grant)
        assert isinstance(outcome, Rejected)
        assert reason in outcome.reason
    assert engine.stats().grant == before


async def test_kv_cache_usage_refers_to_the_current_capacity(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    floor = engine.limits.kv_floor_bytes
    await engine.resize(kv_grant(engine, 2 * floor, seqs=1))
    stream = served(engine).generate(numbered_request(1, max_tokens=400))
    received = 0
    while received < 150:  # not chunks: on a busy machine, one can have many tokens
        received += len((await anext(stream)).token_ids)
    narrow = engine.stats().kv_cache_usage
    await engine.resize(kv_grant(engine, 16 * floor, seqs=1))
    async for _ in stream:
        if engine.stats().kv_cache_usage < narrow / 4:
            break
    else:
        pytest.fail(f"the usage was {narrow} of the small cache, and still is {engine.stats().kv_cache_usage}")
    await stream.aclose()


async def test_an_engine_at_its_floor_serves_its_longest_request(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    await engine.resize(kv_grant(engine, engine.limits.kv_floor_bytes, seqs=32))
    long = GenerateRequest("long", (Message("user", "x" * 500),), 0.0, 1.0, 8)
    short = [numbered_request(n) for n in range(10)]
    replies = await asyncio.gather(tokens(engine, long), *(tokens(engine, request) for request in short))
    assert all(replies)
    with pytest.raises(EngineError, match="refused"):
        await tokens(engine, GenerateRequest("too long", (Message("user", "x" * 600),), 0.0, 1.0, 8))


async def test_a_shrink_returns_memory_to_the_system(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    floor = engine.limits.kv_floor_bytes
    await engine.resize(kv_grant(engine, 32 * floor))
    await all_tokens(engine, 100)
    process = engine_process(fleet, "plain")
    full = process.memory_full_info().uss
    outcome = await engine.resize(kv_grant(engine, floor))
    assert isinstance(outcome, Applied)
    assert full - process.memory_full_info().uss > 8 * floor


async def test_two_engines_trade_memory_under_load_without_loss(fleet: Fleet) -> None:
    cached, plain = fleet.engines["cached"], fleet.engines["plain"]
    undisturbed = await all_tokens(cached, 60)
    both = 0.9

    def split(share: float) -> Mapping[str, Grant]:
        return {"cached": Grant(share, 32, 2048), "plain": Grant(both - share, 32, 2048)}

    await fleet.sharing.resize(split(0.45))
    rounds = 0
    while rounds <= 5:  # one round, or more if a busy machine delays the resizes
        work = asyncio.gather(all_tokens(cached, 60), all_tokens(plain, 60))
        while not work.done():
            outcomes = await fleet.sharing.resize(split(0.6 if rounds % 2 else 0.3), grace_s=0.02)
            for outcome in outcomes.values():
                assert not isinstance(outcome, Rejected)
                if isinstance(outcome, Deferred):
                    assert isinstance(await outcome.settled, Applied | Superseded)
            assert sum(fleet.sharing.ledger.held.values()) <= DEVICE
            rounds += 1
        assert list(await work) == [undisturbed, undisturbed]


async def test_a_hanging_engine_is_restarted_and_its_requests_are_served(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    undisturbed = await all_tokens(engine, 20)
    work = asyncio.create_task(all_tokens(engine, 20))
    await until_running(engine)
    engine_process(fleet, "plain").suspend()
    assert await work == undisturbed


@pytest.mark.parametrize("name", ["cached", "plain"])
async def test_an_engine_that_sleeps_with_its_process_gives_its_cache_back_and_replies_as_before(
    name: str, fleet: Fleet
) -> None:
    """A CPU engine releases its KV cache only, and sleeps without its process. Here it is told to keep it."""
    engine = fleet.engines[name]
    assert isinstance(engine, SupervisedEngine)
    process: Any = engine._engine
    engine._limits = process._limits = replace(process.limits, copy_bytes=1)
    before, expected = engine.stats(), await all_tokens(engine, 12)
    assert before.grant is not None
    await engine.sleep()
    asleep = engine.stats()
    assert (asleep.state, asleep.kv_cache_bytes, asleep.pid) == (EngineState.ASLEEP, 0, before.pid)
    assert process.stats().kv_cache_bytes == 0
    held = asyncio.create_task(all_tokens(engine, 12))
    await engine.wake()
    assert await held == expected
    assert engine.stats().kv_cache_bytes == engine.limits.kv_floor_bytes
    assert isinstance(await engine.resize(before.grant), Applied)
    assert await all_tokens(engine, 12) == expected
    assert engine.stats().pid == before.pid
    with pytest.raises(EngineError, match=f"engine {name}: troupe_nap failed: "):
        await process._move("troupe_nap")


async def test_calls_to_an_engine_that_has_just_died_return(fleet: Fleet, events: list[Event]) -> None:
    engine = fleet.engines["plain"]

    async def kill_and_wait() -> None:
        before = len(events)
        engine.kill()
        while not any(isinstance(e, EngineChanged) and e.state is EngineState.READY for e in events[before:]):  # noqa: ASYNC110 (there is no event to wait for)
            await asyncio.sleep(0.01)

    grant = kv_grant(engine, engine.limits.kv_floor_bytes)
    await engine.resize(grant)
    undisturbed = await tokens(engine, numbered_request(1))
    for _ in range(2):  # in round two the engine has served no request yet, and vLLM's client first asks it something
        engine.kill()
        reply, outcome = await asyncio.wait_for(
            asyncio.gather(tokens(engine, numbered_request(1)), engine.resize(grant)), timeout=LONG_S
        )
        assert reply == undisturbed
        assert isinstance(outcome, Rejected)
        await kill_and_wait()


@pytest.mark.parametrize("name", ["cached", "plain"])
async def test_a_killed_engine_restarts_and_every_request_gets_the_right_reply(
    fleet: Fleet, events: list[Event], name: str
) -> None:
    engine, other = fleet.engines[name], fleet.engines["plain" if name == "cached" else "cached"]
    await fleet.sharing.resize({"cached": Grant(0.4, 32, 2048), "plain": Grant(0.4, 32, 2048)})
    undisturbed = await all_tokens(engine, 60)
    before = len(events)
    grant = engine.stats().grant
    work = asyncio.gather(all_tokens(engine, 60), all_tokens(other, 60))
    await until_running(engine)
    engine_process(fleet, name).kill()
    assert list(await work) == [undisturbed, undisturbed]
    assert await tokens(engine, numbered_request(1)) == undisturbed[1]
    assert engine.stats().grant == grant
    changes = [(e.engine, e.state) for e in events[before:] if isinstance(e, EngineChanged)]
    assert (name, EngineState.DEAD) in changes
    assert changes[-1] == (name, EngineState.READY)
    assert all(engine == name for engine, _ in changes), "the other engine changed its state"


async def test_a_request_that_was_alone_in_a_crash_is_quarantined(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    undisturbed = await all_tokens(engine, 20)

    async def crash_under(request: GenerateRequest) -> None:
        async for _ in served(engine).generate(request):
            engine_process(fleet, "plain").send_signal(signal.SIGSEGV)

    with pytest.raises(RequestQuarantined, match="engine plain crashed while it had only this request"):
        await crash_under(numbered_request(1, max_tokens=400))
    assert await all_tokens(engine, 20) == undisturbed


async def test_a_crash_under_many_requests_loses_none(fleet: Fleet) -> None:
    engine = fleet.engines["plain"]
    undisturbed = await all_tokens(engine, 40)
    work = asyncio.create_task(all_tokens(engine, 40))
    await asyncio.sleep(0.05)
    engine_process(fleet, "plain").send_signal(signal.SIGSEGV)
    assert await work == undisturbed
