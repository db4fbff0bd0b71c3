"""Only the request that crashes its engine is refused, after few crashes, and the others wait little for that."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from agents.role import Message
from runtime.engines import quarantine
from runtime.engines.handle import EngineState
from runtime.engines.replicas import Replicas
from runtime.engines.request import Chunk
from runtime.engines.supervised import SupervisedEngine
from runtime.errors import RequestQuarantined
from tests.runtime.engines.supervision import (
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
    """In the first crash only the bystander has no token. In the second, both have one."""
    poison = replicas.generate(replace(LATE_POISON, **how))
    await anext(poison)
    bystander = asyncio.create_task(reply(replicas, LONG))
    await until_sent(made, 2)
    made.engines[-1].crash()
    with pytest.raises(RequestQuarantined, match="engine e crashed; this request is the likeliest cause"):
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


async def test_poison_that_takes_longer_than_a_turn_is_found(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "TURN_S", 0.005)
    async with SupervisedEngine("e", made.make, patience=replace(QUICK, restarts=100)) as engine:
        replicas = Replicas("e", [engine])
        others = [asyncio.create_task(reply(replicas, LONG)) for _ in range(3)]
        async with asyncio.timeout(60):
            with pytest.raises(RequestQuarantined):
                await reply(replicas, LATE_POISON)
        assert {text(chunks) for chunks in await asyncio.gather(*others)} == {LONG_WORDS}
    assert len(made.engines) < 10


async def test_a_request_that_hangs_engines_is_found(replicas: Replicas, made: Made) -> None:
    others = [asyncio.create_task(reply(replicas)) for _ in range(3)]
    with pytest.raises(RequestQuarantined, match="engine e hung"):
        await reply(replicas, replace(POISON, messages=(Message("user", "hang"),)))
    assert {text(chunks) for chunks in await asyncio.gather(*others)} == {WORDS}
    assert len(made.engines) <= 3


async def test_a_fault_after_a_conviction_is_not_blamed_on_a_bystander(replicas: Replicas, made: Made) -> None:
    """Of those that stream at the fault, one was beside poison in a crash before."""
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


async def test_a_reader_that_stops_reading_delays_others_by_one_turn_at_most(
    replicas: Replicas, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "TURN_S", 0.05)
    jobs_request = replace(LONG, stream_interval=64)
    stalled, other = replicas.generate(jobs_request), replicas.generate(jobs_request)
    for _ in range(3):
        await asyncio.gather(anext(stalled), anext(other))
        made.engines[-1].crash()
    await anext(stalled)  # it was in flight at three crashes, so that its turn lasts until its reply ends
    await other.aclose()
    began_s = asyncio.get_running_loop().time()
    assert text(await reply(replicas)) == WORDS
    assert 0.3 < asyncio.get_running_loop().time() - began_s < 0.4 + 0.1
    await stalled.aclose()


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
