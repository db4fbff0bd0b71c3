"""A request is served by one replica after another until it is answered or found to crash them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from agents.role import Message
from runtime.engines.handle import EngineState
from runtime.engines.replicas import Replicas
from runtime.engines.request import Chunk
from runtime.engines.supervised import SupervisedEngine
from runtime.engines.usage import Account
from runtime.errors import EngineDead, EngineError, RequestQuarantined
from tests.runtime.engines.supervision import LATE_POISON, POISON, QUICK, REQUEST, WORDS, Made, reply, text

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("how", [{}, {"schema": {"type": "object"}}, {"schema": {}, "temperature": 1.0}])
async def test_a_reply_continues_after_what_the_dead_engine_streamed(
    replicas: Replicas, made: Made, after: int, how: dict[str, Any]
) -> None:
    chunks = []
    async for chunk in replicas.generate(replace(REQUEST, **how)):
        chunks.append(chunk)
        if len(chunks) == after:
            made.engines[0].kill()
    assert text(chunks) == WORDS
    undisturbed = await reply(replicas)  # by the restarted engine, if there was a restart
    assert [t for chunk in chunks for t in chunk.token_ids] == [t for chunk in undisturbed for t in chunk.token_ids]
    assert chunks[-1].finish == "stop"
    assert len(made.engines) == (1 if after == 0 else 2)


async def test_a_reply_is_resumed_without_a_schema_and_replayed_with_its_seed_with_one(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    for schema in (None, {"type": "object"}):
        made.requests.clear()
        seen = 0
        async for _ in replicas.generate(replace(REQUEST, schema=schema, temperature=1.0)):
            seen += 1
            if seen == 3:
                engine.kill()
        first, second = made.requests
        assert len(second.resume_tokens) == (3 if schema is None else 0)
        assert first.seed == second.seed
        assert (first.seed is None) == (schema is None)
        assert first.request_id != second.request_id


async def test_a_replay_with_different_tokens_raises_an_error(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    made.drift = True
    seen: list[Chunk] = []

    async def disturbed() -> None:
        async for chunk in replicas.generate(replace(REQUEST, schema={})):
            seen.append(chunk)
            if len(seen) == 3:
                engine.kill()

    with pytest.raises(EngineError, match="generated different tokens after its restart"):
        await disturbed()
    assert text(seen) == "one two three"


async def test_a_request_that_was_alone_in_a_crash_is_quarantined(replicas: Replicas, made: Made) -> None:
    with pytest.raises(RequestQuarantined, match="engine e crashed while it had only this request"):
        await reply(replicas, POISON)
    assert text(await reply(replicas)) == WORDS
    assert len(made.requests) == len(made.engines) == 2


async def test_a_request_that_was_alone_when_its_engine_was_killed_is_sent_again(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    chunks = []
    async for chunk in replicas.generate(REQUEST):
        chunks.append(chunk)
        if len(made.engines) < 4:
            engine.kill()
    assert text(chunks) == WORDS


async def test_a_request_is_quarantined_after_four_killed_engines(replicas: Replicas, made: Made) -> None:
    """The kernel's OOM killer, for example, kills an engine whose request needs too much memory."""
    with pytest.raises(RequestQuarantined, match="engine e was killed while it had only this request"):
        await reply(replicas, replace(POISON, messages=(Message("user", "kill"),)))
    assert len(made.requests) == 4


@pytest.mark.parametrize("poisons", [1, 2])
async def test_poison_requests_are_found_and_the_others_are_served(
    engine: SupervisedEngine, replicas: Replicas, made: Made, poisons: int
) -> None:
    """Each poison crashes the engine twice at most: beside the others and alone."""
    streaming = asyncio.create_task(reply(replicas))
    while not made.requests:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    waiting = [asyncio.create_task(reply(replicas)) for _ in range(10)]
    poison = [asyncio.create_task(reply(replicas, POISON)) for _ in range(poisons)]
    late = [asyncio.create_task(reply(replicas)) for _ in range(10)]
    outcomes = await asyncio.gather(*poison, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RequestQuarantined] * poisons
    assert {text(chunks) for chunks in await asyncio.gather(streaming, *waiting, *late)} == {WORDS}
    assert len(made.engines) <= 1 + 2 * poisons
    assert engine.stats().state is EngineState.READY


async def test_a_request_that_crashes_engines_after_its_first_token_is_found(replicas: Replicas, made: Made) -> None:
    others = [asyncio.create_task(reply(replicas)) for _ in range(5)]
    with pytest.raises(RequestQuarantined):
        await reply(replicas, LATE_POISON)
    assert {text(chunks) for chunks in await asyncio.gather(*others)} == {WORDS}
    assert len(made.engines) <= 4


async def test_the_only_request_without_a_token_is_not_blamed_beside_another(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    """It is the only request without a token, but it is not alone in the engine."""
    late_crasher = replicas.generate(REQUEST)
    await anext(late_crasher)
    other = asyncio.create_task(reply(replicas))
    while len(made.requests) < 2:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    made.engines[-1].crash()
    assert text(await other) == WORDS
    assert text([chunk async for chunk in late_crasher]) == WORDS.removeprefix(WORDS.split()[0])


async def test_a_killed_engine_does_not_add_suspicion_in_a_later_crash(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    innocent = asyncio.create_task(reply(replicas))
    while not made.requests:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    engine.kill()
    others = [asyncio.create_task(reply(replicas)) for _ in range(3)]
    poison = asyncio.create_task(reply(replicas, POISON))
    assert {text(chunks) for chunks in await asyncio.gather(innocent, *others)} == {WORDS}
    with pytest.raises(RequestQuarantined):
        await poison


async def test_requests_in_the_quarantine_line_count_as_waiting(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    tasks = [asyncio.create_task(reply(replicas)) for _ in range(10)]
    while len(made.requests) < 10:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    made.engines[-1].crash()
    while engine.stats().state is not EngineState.READY or len(made.engines) < 2:  # noqa: ASYNC110 (no event)
        await asyncio.sleep(0.001)
    assert engine.stats().running + engine.stats().waiting == 10
    await asyncio.gather(*tasks)


async def test_closing_an_engine_blames_no_request(made: Made) -> None:
    supervised = SupervisedEngine("e", made.make, patience=QUICK)
    await supervised.start()
    task = asyncio.create_task(reply(Replicas("e", [supervised])))
    while not made.requests:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    await supervised.close()
    with pytest.raises(EngineDead, match="e is closed"):
        await task


async def test_a_cancelled_suspect_does_not_block_the_line(replicas: Replicas, made: Made) -> None:
    tasks = [asyncio.create_task(reply(replicas)) for _ in range(5)]
    await asyncio.sleep(0)
    made.engines[0].crash()
    await asyncio.sleep(0)
    for task in tasks[:4]:
        task.cancel()
    assert text(await tasks[4]) == WORDS
    assert {text(chunks) for chunks in await asyncio.gather(*(reply(replicas) for _ in range(5)))} == {WORDS}


def test_a_reply_with_stop_strings_cannot_be_resumed() -> None:
    """vLLM holds back the last characters of its tokens, because they may be the beginning of a stop string."""
    assert REQUEST.resumable
    assert not replace(REQUEST, stop=("x",)).resumable


@pytest.mark.parametrize("sampling_params", [{"frequency_penalty": 0.5}, {"presence_penalty": 0.5}])
async def test_a_reply_with_penalties_is_replayed(
    engine: SupervisedEngine, replicas: Replicas, made: Made, sampling_params: dict[str, Any]
) -> None:
    """Penalties would treat tokens that are appended to the prompt as part of the prompt."""
    chunks = []
    async for chunk in replicas.generate(replace(REQUEST, sampling_params=sampling_params)):
        chunks.append(chunk)
        if len(chunks) == 3:
            engine.kill()
    assert text(chunks) == WORDS
    assert [request.resume_tokens for request in made.requests] == [(), ()]


async def test_all_requests_in_flight_survive_two_kills(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    tasks = [asyncio.create_task(reply(replicas)) for _ in range(50)]
    for _ in range(2):
        await asyncio.sleep(0.04)
        engine.kill()
    assert {text(chunks) for chunks in await asyncio.gather(*tasks)} == {WORDS}


@pytest.fixture
async def two() -> AsyncIterator["Two"]:
    """Two replicas of one engine, what their supervisors did, and the replicas."""
    made = [Made(), Made()]
    async with (
        SupervisedEngine("e", made[0].make, patience=SLOW) as first,
        SupervisedEngine("e", made[1].make, patience=SLOW) as second,
    ):
        yield Replicas("e", [first, second]), made, [first, second]


SLOW = replace(QUICK, backoff_s=(5,))
"""So that a replica which has died is away for a while."""
Two = tuple[Replicas, list[Made], list[SupervisedEngine]]


async def test_requests_are_spread_over_the_replicas(two: Two) -> None:
    replicas, made, _ = two
    replies = await asyncio.gather(*(reply(replicas) for _ in range(20)))
    assert {text(chunks) for chunks in replies} == {WORDS}
    assert [len(each.requests) for each in made] == [10, 10]


@pytest.mark.parametrize("how", [{}, {"schema": {"type": "object"}}, {"schema": {}, "temperature": 1.0}])
@pytest.mark.parametrize("end", ["kill", "crash", "hang"])
async def test_a_reply_continues_on_another_replica_without_waiting_for_a_restart(
    two: Two, end: str, how: dict[str, Any]
) -> None:
    replicas, made, _ = two
    others = [asyncio.create_task(reply(replicas, replace(REQUEST, **how))) for _ in range(6)]
    began_s, chunks = asyncio.get_running_loop().time(), []
    async for chunk in replicas.generate(replace(REQUEST, **how)):
        chunks.append(chunk)
        if len(chunks) == 3:
            first = made[0].engines[0]
            if end == "hang":
                first.hangs = True
            else:
                getattr(first, end)()
    assert text(chunks) == WORDS
    assert {text(await task) for task in others} == {WORDS}
    assert asyncio.get_running_loop().time() - began_s < 1
    assert sum(request.max_tokens == REQUEST.max_tokens for request in made[1].requests) == 7  # the others are tests


async def test_a_request_that_crashes_replicas_is_found_before_it_has_crashed_three(two: Two) -> None:
    replicas, made, engines = two
    others = [asyncio.create_task(reply(replicas)) for _ in range(6)]
    with pytest.raises(RequestQuarantined):
        await reply(replicas, POISON)
    assert {text(await task) for task in others} == {WORDS}
    assert sum(len(each.engines) for each in made) <= 4
    await asyncio.sleep(6)
    assert [engine.stats().state for engine in engines] == [EngineState.READY] * 2


async def test_a_crash_of_one_replica_blames_no_request_of_another(two: Two) -> None:
    replicas, made, _ = two
    first, second = asyncio.create_task(reply(replicas)), asyncio.create_task(reply(replicas))
    while not all(each.requests for each in made):  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    for each in made:  # each of them twice: a request that is blamed for both crashes would be poison
        each.engines[-1].kill()
    assert text(await first) == text(await second) == WORDS


async def test_a_request_goes_to_a_replica_that_is_ready(two: Two) -> None:
    replicas, made, (first, second) = two
    await first.sleep()
    assert text(await reply(replicas)) == WORDS
    assert not made[0].requests
    await second.sleep()
    held = [asyncio.create_task(reply(replicas)) for _ in range(2)]
    await asyncio.sleep(10)
    assert [first.stats().waiting, second.stats().waiting] == [1, 1]
    await first.wake()
    await second.wake()
    assert {text(await task) for task in held} == {WORDS}


async def test_requests_are_served_until_the_last_replica_has_failed(two: Two) -> None:
    replicas, made, (first, second) = two
    for each in made:
        each.fail_to_start = 100
    first.kill()
    await asyncio.sleep(30)
    assert first.stats().state is EngineState.FAILED
    assert text(await reply(replicas)) == WORDS
    second.kill()
    with pytest.raises(EngineDead, match="keeps failing: 4 restarts within 60 s; no memory left"):
        await reply(replicas)


async def test_a_request_is_charged_by_every_replica_that_worked_on_it(two: Two) -> None:
    replicas, made, (first, second) = two
    request, chunks = replace(REQUEST, account=Account()), []
    async for chunk in replicas.generate(request):
        chunks.append(chunk)
        if len(chunks) == 4:
            made[0].engines[0].kill()
    assert (first.usage.arrived, second.usage.arrived) == (1, 1)
    assert (first.usage.in_flight, second.usage.in_flight) == (0, 0)
    charge = request.account.charge
    assert charge.engine_seconds == pytest.approx(0.01 * len(WORDS.split()), rel=0.3)
    assert charge == first.usage.charged() + second.usage.charged()
    assert request.account.device_seconds == pytest.approx(charge.engine_seconds)  # each holds its whole device


async def test_requests_that_wait_for_a_replica_go_to_another_one_when_it_leaves(two: Two) -> None:
    replicas, made, (first, second) = two
    await second.sleep()
    stalled = replicas.generate(REQUEST)  # the first replica drains until it ends
    await anext(stalled)
    leaving = asyncio.create_task(first.leave())
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(reply(replicas)) for _ in range(4)]  # of which some wait for the first replica
    await asyncio.sleep(1)
    assert first.stats().waiting + second.stats().waiting >= 4
    await stalled.aclose()
    await leaving
    assert first.stats().state is EngineState.ABSENT
    await second.wake()
    assert {text(await task) for task in waiting} == {WORDS}
    assert text(await reply(replicas)) == WORDS
    assert len(made[0].requests) == 1


async def test_a_request_fails_if_every_replica_is_absent_or_has_failed(two: Two) -> None:
    replicas, _, engines = two
    for engine in engines:
        await engine.leave()
    with pytest.raises(EngineDead, match="no replica that serves: e is absent, e is absent"):
        await reply(replicas)


async def test_an_absent_replica_that_does_not_start_is_absent_again_and_can_be_tried_again(two: Two) -> None:
    replicas, made, (first, _) = two
    await first.leave()
    made[0].fail_to_start = 100
    with pytest.raises(EngineError, match="no memory left"):
        await first.wake()
    assert first.stats().state is EngineState.ABSENT
    assert text(await reply(replicas)) == WORDS
    made[0].fail_to_start = 0
    await first.wake()
    assert first.stats().state is EngineState.READY


async def test_a_request_waits_for_whichever_replica_is_ready_first(two: Two) -> None:
    replicas, _, (first, second) = two
    await first.sleep()
    await second.sleep()
    held = [asyncio.create_task(reply(replicas)) for _ in range(4)]
    await asyncio.sleep(1)
    assert sorted(engine.usage.in_flight for engine in (first, second)) == [2, 2]
    await second.wake()
    assert {text(await task) for task in held} == {WORDS}
    assert first.stats().state is EngineState.COLD


async def test_suspects_in_the_line_do_not_wait_for_a_replica_that_restarts(two: Two) -> None:
    replicas, made, _ = two
    tasks = [asyncio.create_task(reply(replicas)) for _ in range(8)]
    while not all(each.requests for each in made):  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    began_s = asyncio.get_running_loop().time()
    made[0].engines[0].crash()
    assert {text(await task) for task in tasks} == {WORDS}
    assert asyncio.get_running_loop().time() - began_s < 1


async def test_a_request_that_is_sent_again_to_its_replica_arrives_once(engine: SupervisedEngine, made: Made) -> None:
    replicas = Replicas("e", [engine])
    chunks = []
    async for chunk in replicas.generate(REQUEST):
        chunks.append(chunk)
        if len(chunks) == 3:
            engine.kill()
    assert text(chunks) == WORDS
    assert (engine.usage.arrived, engine.usage.finished, len(made.engines)) == (1, 1, 2)


@pytest.mark.parametrize("how", [{}, {"schema": {}}])
async def test_a_resumed_reply_ends_before_its_engine_sleeps(
    engine: SupervisedEngine, made: Made, how: dict[str, Any]
) -> None:
    replicas = Replicas("e", [engine])
    stream = replicas.generate(replace(REQUEST, **how))
    chunks = [await anext(stream) for _ in range(3)]
    engine.kill()
    rest = asyncio.create_task(_rest(stream))
    while len(made.requests) < 2:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    await engine.sleep()
    assert text([*chunks, *await rest]) == WORDS
    assert engine.stats().state is EngineState.COLD


async def _rest(stream: AsyncGenerator[Chunk, None]) -> list[Chunk]:
    return [chunk async for chunk in stream]


async def test_a_sleeping_replica_can_leave(two: Two) -> None:
    _, _, (first, _) = two
    await first.sleep()
    await first.leave()
    assert (first.stats().state, first.held_bytes) == (EngineState.ABSENT, 0)
