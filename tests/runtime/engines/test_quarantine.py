"""Only the request that crashes its engine is refused, after few crashes, and the others wait little for that."""

import asyncio
import gc
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from agents.role import Message
from runtime.engines import quarantine
from runtime.engines.fake import FakeEngine
from runtime.engines.handle import EngineState, Recalled
from runtime.engines.quarantine import Call, Incident, Quarantine
from runtime.engines.replicas import Replicas
from runtime.engines.request import Chunk
from runtime.engines.supervised import SupervisedEngine
from runtime.errors import Death, RequestQuarantined, RequestRefused
from tests.runtime.engines.supervision import (
    ERRS_LATE,
    LATE_POISON,
    LONG,
    LONG_WORDS,
    POISON,
    QUICK,
    REQUEST,
    WORDS,
    Made,
    reply,
    text,
)

pytestmark = pytest.mark.virtual_time


async def until_sent(made: Made, requests: int) -> None:
    while len(made.requests) < requests:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)


@pytest.mark.parametrize("how", [{}, {"schema": {}}])
async def test_late_poison_is_found_and_not_its_bystander(replicas: Replicas, made: Made, how: dict[str, Any]) -> None:
    """At the first crash, only the poison has a token. At the second, both requests have one."""
    poison = replicas.generate(replace(LATE_POISON, **how))
    await anext(poison)
    bystander = asyncio.create_task(reply(replicas, LONG))
    await until_sent(made, 2)
    made.engines[-1].crash()
    with pytest.raises(RequestQuarantined, match="engine e crashed while it had only this request"):
        _ = [chunk async for chunk in poison]
    assert text(await bystander) == LONG_WORDS
    assert len(made.engines) <= 4


async def test_late_poison_is_found_among_new_requests(replicas: Replicas, made: Made) -> None:
    """At each crash, other requests are new and have no token yet."""
    poison = asyncio.create_task(reply(replicas, LATE_POISON))
    replies: list[asyncio.Task[list[Chunk]]] = []
    while not poison.done() and len(replies) < 1000:
        replies.append(asyncio.create_task(reply(replicas)))
        await asyncio.sleep(0.005)
    with pytest.raises(RequestQuarantined):
        await poison
    assert {text(chunks) for chunks in await asyncio.gather(*replies)} == {WORDS}
    assert len(made.engines) <= 4


async def test_poison_that_takes_longer_than_its_time_alone_is_found(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is resumed shortly before the token that crashes the engine."""
    monkeypatch.setattr(quarantine, "ALONE_S", 0.035)
    async with SupervisedEngine("e", made.make, patience=replace(QUICK, restarts=100)) as engine:
        replicas = Replicas("e", [engine])
        others = [asyncio.create_task(reply(replicas, LONG)) for _ in range(3)]
        async with asyncio.timeout(60):
            with pytest.raises(RequestQuarantined):
                await reply(replicas, replace(LATE_POISON, stream_interval=1))
        assert {text(chunks) for chunks in await asyncio.gather(*others)} == {LONG_WORDS}
    assert len(made.engines) < 10


async def test_a_request_that_hangs_engines_is_found(replicas: Replicas, made: Made) -> None:
    others = [asyncio.create_task(reply(replicas)) for _ in range(3)]
    with pytest.raises(RequestQuarantined, match="engine e hung"):
        await reply(replicas, replace(POISON, messages=(Message("user", "hang"),)))
    assert {text(chunks) for chunks in await asyncio.gather(*others)} == {WORDS}
    assert len(made.engines) <= 3


async def test_a_fault_after_a_conviction_is_not_blamed_on_a_bystander(replicas: Replicas, made: Made) -> None:
    """One of the requests that stream at the fault was beside poison at an earlier crash."""
    bystander = asyncio.create_task(reply(replicas, LONG))
    await until_sent(made, 1)
    with pytest.raises(RequestQuarantined):
        await reply(replicas, POISON)
    other = asyncio.create_task(reply(replicas, LONG))
    await asyncio.sleep(0.3)
    assert made.engines[-1].stats().running == 2
    made.engines[-1].crash()
    assert text(await bystander) == text(await other) == LONG_WORDS
    assert len(made.engines) == 4


@pytest.mark.parametrize("end", ["crash", "kill"])
async def test_two_faults_convict_no_request(replicas: Replicas, made: Made, end: str) -> None:
    tasks = [asyncio.create_task(reply(replicas, LONG)) for _ in range(20)]
    for _ in range(2):
        await asyncio.sleep(0.3)
        assert made.engines[-1].stats().running == 20
        getattr(made.engines[-1], end)()
    assert {text(chunks) for chunks in await asyncio.gather(*tasks)} == {LONG_WORDS}


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_fault_delays_each_request_by_a_token_of_those_without_one(
    replicas: Replicas, made: Made, streamed: bool
) -> None:
    tasks = [asyncio.create_task(reply(replicas, LONG)) for _ in range(20)]
    await until_sent(made, 20)
    if streamed:
        await asyncio.sleep(0.3)
    made.engines[-1].crash()
    began_s = asyncio.get_running_loop().time()
    await asyncio.gather(*tasks)
    took_s = asyncio.get_running_loop().time() - began_s
    assert took_s < 0.01 * len(LONG_WORDS.split()) + (0.05 if streamed else 0.05 + 20 * 0.02)


async def test_a_test_is_not_compared_with_the_streamed_reply(replicas: Replicas, made: Made) -> None:
    """The engine that tests the reply generates different tokens. The reply itself gets the same ones again."""
    schema = replace(LONG, schema={})
    tasks = [asyncio.create_task(reply(replicas, schema)) for _ in range(2)]
    for sent in (2, 4):
        await asyncio.sleep(0.3)
        assert len(made.requests) == sent
        made.engines[-1].crash()
    made.drift = True
    await asyncio.sleep(0.1)
    assert len(made.requests) == 5  # the first test
    made.drift = False
    assert {text(chunks) for chunks in await asyncio.gather(*tasks)} == {LONG_WORDS}


async def test_poison_with_min_tokens_is_tested(replicas: Replicas, made: Made) -> None:
    others = [asyncio.create_task(reply(replicas)) for _ in range(3)]
    await until_sent(made, 3)
    with pytest.raises(RequestQuarantined):
        await reply(replicas, replace(POISON, sampling_params={"min_tokens": 50}))
    assert {text(chunks) for chunks in await asyncio.gather(*others)} == {WORDS}
    assert len(made.engines) == 3


@pytest.mark.parametrize("first_reads", [True, False])
async def test_a_reader_that_stops_reading_delays_others_by_two_seconds_at_most(
    replicas: Replicas, made: Made, first_reads: bool
) -> None:
    """The API reads no further from the reply to one prompt until every prompt of its request has its first token."""
    jobs_request = replace(LONG, stream_interval=64)
    stalled, other = replicas.generate(jobs_request), replicas.generate(jobs_request)
    for _ in range(3):
        await asyncio.gather(anext(stalled), anext(other))
        made.engines[-1].crash()
    began_s = asyncio.get_running_loop().time()
    if first_reads:
        await asyncio.gather(anext(stalled), anext(other))  # both were in flight at three crashes
        assert asyncio.get_running_loop().time() - began_s < 2.1
    else:
        await anext(stalled)
        await other.aclose()
    assert text(await reply(replicas)) == WORDS
    assert asyncio.get_running_loop().time() - began_s < 4.3
    await stalled.aclose()
    await other.aclose()


async def test_a_reader_that_reads_slowly_delays_others_by_its_time_alone(
    replicas: Replicas, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "ALONE_S", 3.0)
    slow, other = replicas.generate(LONG), replicas.generate(LONG)
    for _ in range(3):
        await asyncio.gather(anext(slow), anext(other))
        made.engines[-1].crash()
    await anext(slow)
    await other.aclose()
    began_s = asyncio.get_running_loop().time()
    waiting = asyncio.create_task(reply(replicas))
    while not waiting.done():
        await asyncio.sleep(1)
        await anext(slow)
    assert 3 <= asyncio.get_running_loop().time() - began_s <= 5
    await slow.aclose()


async def test_a_bystander_is_not_convicted_after_another_caller_has_left(replicas: Replicas, made: Made) -> None:
    """The engine still runs the request whose caller has left."""
    bystander = asyncio.create_task(reply(replicas, LONG))
    leaving = asyncio.create_task(reply(replicas, LONG))
    await asyncio.sleep(0.3)
    leaving.cancel()
    await asyncio.sleep(0.05)
    made.engines[-1].crash()
    assert text(await bystander) == LONG_WORDS


async def test_a_bystander_is_not_convicted_of_the_hangs_of_requests_that_time_out(
    replicas: Replicas, made: Made
) -> None:
    bystander = asyncio.create_task(reply(replicas, LONG))
    for _ in range(3):
        leaving = asyncio.create_task(reply(replicas, replace(POISON, messages=(Message("user", "hang"),))))
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.sleep(0.4)
    assert text(await bystander) == LONG_WORDS


async def test_a_request_that_left_is_no_longer_in_flight_once_a_later_one_is_answered(
    replicas: Replicas, made: Made
) -> None:
    leaving = replicas.generate(REQUEST)
    await anext(leaving)
    await leaving.aclose()
    assert text(await reply(replicas)) == WORDS
    with pytest.raises(RequestQuarantined):
        await reply(replicas, POISON)
    assert len(made.requests) == 3


async def test_an_error_that_shows_after_the_first_token_is_not_blamed_on_the_next_test(
    replicas: Replicas, made: Made
) -> None:
    others = [asyncio.create_task(reply(replicas))]
    await until_sent(made, 1)
    late = asyncio.create_task(reply(replicas, ERRS_LATE))
    await until_sent(made, 2)
    others += [asyncio.create_task(reply(replicas)) for _ in range(3)]
    with pytest.raises(RequestQuarantined):
        await late
    assert {text(chunks) for chunks in await asyncio.gather(*others)} == {WORDS}
    assert len(made.engines) == 3


async def test_a_conviction_spares_the_others_their_tests(replicas: Replicas, made: Made) -> None:
    """Poison is the first in the line, because it is refused while it is sent."""
    others = [asyncio.create_task(reply(replicas)) for _ in range(20)]
    await until_sent(made, 20)
    with pytest.raises(RequestQuarantined):
        await reply(replicas, POISON)
    assert {text(chunks) for chunks in await asyncio.gather(*others)} == {WORDS}
    tests = [request for request in made.requests if request.max_tokens != REQUEST.max_tokens]
    assert len(tests) == 1


class Lost(FakeEngine):
    """A replica that can be lost with its node. `excused` counts the deaths that were excused."""

    lost = False
    excused = 0

    @property
    def state(self) -> EngineState:
        return EngineState.LOST if self.lost else super().state

    def excuse_death(self) -> None:
        self.excused += 1


async def test_a_conviction_excuses_no_death_that_the_replica_has_not_noted() -> None:
    replica, call, suspicions = Lost("e", lambda request: WORDS), Call(), Quarantine()
    replica.lost = True
    suspicions.sent(call, replica)
    suspicions.died(replica, Death.KILLED)
    replica.lost = False
    suspicions.sent(call, replica)
    suspicions.died(replica, Death.CRASHED)
    assert (call.convicted_of, replica.excused) == (Death.CRASHED, 1)


@pytest.mark.parametrize("beside", [False, True])
async def test_crashes_of_poison_use_up_no_restarts_but_are_paused_between(made: Made, beside: bool) -> None:
    patience = replace(QUICK, backoff_s=(0, 1), restarts=4, within_s=600)
    async with SupervisedEngine("e", made.make, patience=patience) as engine:
        replicas = Replicas("e", [engine])
        began_s = asyncio.get_running_loop().time()
        for _ in range(10):
            bystander = asyncio.create_task(reply(replicas)) if beside else None
            await asyncio.sleep(0.03)
            with pytest.raises(RequestQuarantined):
                await reply(replicas, POISON)
            if bystander is not None:
                assert text(await bystander) == WORDS
        crashes = 20 if beside else 10
        assert asyncio.get_running_loop().time() - began_s > crashes - 2
        assert text(await reply(replicas)) == WORDS
        assert len(made.engines) == 1 + crashes
        assert engine.stats().state is EngineState.READY


@pytest.mark.parametrize("seed", range(20))
async def test_only_poison_is_refused(seed: int) -> None:
    """Requests come in a random order to two replicas, which also crash without a request's fault."""
    chosen = random.Random(seed)
    made, patience = [Made(), Made()], replace(QUICK, restarts=100)
    kinds = ["go on"] * 6 + ["long"] * 6 + ["poison", "late poison", "kill", "hang"]
    outcomes: list[tuple[str, str]] = []

    async def call(replicas: Replicas, kind: str) -> None:
        await asyncio.sleep(chosen.random())
        request = replace(REQUEST, messages=(Message("user", kind),), stream_interval=chosen.choice([1, 64]))
        try:
            outcomes.append((kind, text(await reply(replicas, request))))
        except RequestQuarantined:
            outcomes.append((kind, "refused"))

    async with (
        SupervisedEngine("e", made[0].make, patience=patience) as first,
        SupervisedEngine("e", made[1].make, patience=patience) as second,
    ):
        replicas = Replicas("e", [first, second])
        calls = [asyncio.create_task(call(replicas, kind)) for kind in chosen.choices(kinds, k=20)]
        for _ in range(2):
            await asyncio.sleep(chosen.random())
            engine = chosen.choice(made).engines[-1]
            if engine.stats().running > 1:
                engine.crash()
        await asyncio.gather(*calls)
    replies = {"go on": WORDS, "long": LONG_WORDS}
    assert outcomes == [(kind, replies.get(kind, "refused")) for kind, _ in outcomes]


def reachable_calls(start: object) -> int:
    """Return how many calls an object keeps in memory."""
    seen, stack = {id(start): start}, [start]
    while stack:
        for other in gc.get_referents(stack.pop()):
            if id(other) not in seen and isinstance(other, dict | set | frozenset | tuple | list | Call | Incident):
                seen[id(other)] = other
                stack.append(other)
    return sum(isinstance(each, Call) for each in seen.values())


async def test_requests_whose_callers_leave_are_forgotten() -> None:
    quarantined, replica = Quarantine(), FakeEngine("e", lambda request: "")
    for _ in range(100):
        with suppress(asyncio.CancelledError):
            async with quarantined.cleared(call := Call()):
                quarantined.sent(call, replica)
                quarantined.streamed(call, replica, Chunk("a", (1,), 0.0, 1))
                raise asyncio.CancelledError
    assert reachable_calls(call) == 1
    assert reachable_calls(quarantined._left) == 1  # until a later request has a token


@pytest.mark.parametrize("error", [Recalled(), RequestRefused("too long")])
async def test_a_request_that_its_replica_does_not_run_clears_nobody_else(error: Exception) -> None:
    """The next request is alone in the replica, and is convicted at its first crash."""
    quarantined, replica = Quarantine(), FakeEngine("e", lambda request: "")
    with suppress(Recalled, RequestRefused):
        async with quarantined.cleared(call := Call()):
            quarantined.sent(call, replica)
            raise error
    poison = Call()
    async with quarantined.cleared(poison):
        quarantined.sent(poison, replica)
        quarantined.died(replica, Death.CRASHED)
    assert poison.convicted_of is Death.CRASHED
    assert call.incidents == []
