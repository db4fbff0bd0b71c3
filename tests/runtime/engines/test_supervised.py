"""An engine that dies is restarted, and its callers notice only a pause."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from runtime.engines import supervised
from runtime.engines.fake import FakeEngine, FakeMemory, ServiceTime
from runtime.engines.grant import Grant, Rejected
from runtime.engines.handle import EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.replicas import Replicas
from runtime.engines.supervised import SupervisedEngine
from runtime.engines.usage import Held
from runtime.errors import EngineDead, EngineError
from tests.runtime.engines.supervision import QUICK, REQUEST, WORDS, Hanging, Made, reply, text

pytestmark = pytest.mark.virtual_time


async def test_a_dead_engine_is_restarted_with_its_grant_without_a_request(
    engine: SupervisedEngine, made: Made
) -> None:
    grant = Grant(0.5, 7, 100)
    await engine.resize(grant)
    engine.kill()
    await asyncio.sleep(0.2)
    assert made.grants == [None, grant]
    assert engine.stats().grant == grant
    assert made.states == [EngineState.READY, EngineState.DEAD, EngineState.STARTING, EngineState.READY]


async def test_a_listener_that_raises_does_not_keep_a_dead_engine_from_a_restart(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_error(state: EngineState) -> None:
        raise OSError("No space left on device")

    engine = SupervisedEngine("e", made.make, raise_error, QUICK)
    await engine.start()
    engine.kill()
    assert text(await reply(Replicas("e", [engine]))) == WORDS
    assert len(made.engines) == 2
    assert caplog.text.count("engine e: its listener raised") == 1
    await engine.close()


async def test_requests_wait_during_a_restart(engine: SupervisedEngine, replicas: Replicas, made: Made) -> None:
    made.fail_to_start = 2
    engine.kill()
    replies = await asyncio.gather(*(reply(replicas) for _ in range(20)))
    assert {text(chunks) for chunks in replies} == {WORDS}
    assert len(made.engines) == 4


async def test_a_hanging_engine_is_killed_and_its_requests_are_sent_again(replicas: Replicas, made: Made) -> None:
    task = asyncio.create_task(reply(replicas))
    await asyncio.sleep(0.03)
    made.engines[0].hangs = True
    assert text(await task) == WORDS
    assert made.engines[0].stats().state is EngineState.CLOSED


async def test_an_engine_whose_pulse_fails_is_killed_and_its_requests_are_sent_again(
    replicas: Replicas, made: Made
) -> None:
    async def fail() -> None:
        raise EngineError("the ranks do not answer")

    task = asyncio.create_task(reply(replicas))
    await asyncio.sleep(0.03)
    made.engines[0].pulse = fail  # type: ignore[method-assign]
    assert text(await task) == WORDS
    assert made.engines[0].stats().state is EngineState.CLOSED
    assert len(made.engines) == 2


async def test_an_engine_that_keeps_dying_fails_with_the_reason(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    made.fail_to_start = 100
    engine.kill()
    with pytest.raises(EngineError, match=r"e keeps failing: 4 restarts within 60 s; no memory left"):
        await reply(replicas)
    assert engine.stats().state is EngineState.FAILED
    assert made.states[-1] is EngineState.FAILED
    with pytest.raises(EngineError, match="keeps failing"):
        await reply(replicas)
    outcome = await engine.resize(Grant(0.5, 7, 100))
    assert "keeps failing" in getattr(outcome, "reason", "")


async def test_an_engine_that_dies_without_a_request_fails(engine: SupervisedEngine, made: Made) -> None:
    for death in range(QUICK.restarts + 1):
        assert (engine.stats().state, len(made.engines)) == (EngineState.READY, death + 1)
        made.engines[-1].crash()
        await asyncio.sleep(1)
    assert engine.stats().state is EngineState.FAILED


async def test_an_engine_may_die_again_after_a_while(made: Made) -> None:
    async with SupervisedEngine("e", made.make, patience=replace(QUICK, within_s=10)) as engine:
        for _ in range(3 * QUICK.restarts):
            made.engines[-1].crash()
            await asyncio.sleep(3)
        assert engine.stats().state is EngineState.READY


async def test_a_failed_first_start_raises(made: Made) -> None:
    supervised = SupervisedEngine("e", made.make)
    made.engines[0].fails_to_start = True
    with pytest.raises(EngineError, match="no memory left"):
        await supervised.start()
    await supervised.close()


async def test_closing_fails_waiting_requests(made: Made) -> None:
    supervised = SupervisedEngine("e", made.make, patience=replace(QUICK, backoff_s=(60,)))
    await supervised.start()
    supervised.kill()
    waiting = asyncio.create_task(reply(Replicas("e", [supervised])))
    await asyncio.sleep(0.05)
    await supervised.close()
    with pytest.raises(EngineError, match="e is closed"):
        await waiting


async def test_an_engine_sleeps_after_its_requests_and_wakes_for_those_that_it_held(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    running = asyncio.create_task(reply(replicas))
    await asyncio.sleep(0.02)
    asleep = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0)
    assert engine.stats().state is EngineState.DRAINING
    held = asyncio.create_task(reply(replicas))
    await asleep
    assert text(running.result()) == WORDS
    assert (engine.stats().state, engine.stats().waiting) == (EngineState.COLD, 1)
    assert made.engines[0].stats().state is EngineState.CLOSED
    await asyncio.sleep(10)  # no pulse restarts it, and no request times out
    assert len(made.engines) == 1
    assert engine.stats().held == 1
    await engine.wake()
    assert text(await held) == WORDS
    assert engine.stats().state is EngineState.READY
    assert made.grants[1] == engine.limits.smallest_grant
    assert made.states == [
        EngineState.READY,
        EngineState.DRAINING,
        EngineState.COLD,
        EngineState.WAKING,
        EngineState.READY,
    ]


async def test_a_sleeping_engine_holds_no_memory_and_takes_no_grant(engine: SupervisedEngine) -> None:
    await engine.sleep()
    before = engine.usage.idle
    await asyncio.sleep(5)
    assert isinstance(await engine.resize(Grant(0.5, 64, 2048)), Rejected)
    with engine.usage.request(0):
        pass
    assert engine.usage.idle.byte_seconds == before.byte_seconds
    with pytest.raises(EngineError, match="cold and cannot go to sleep"):
        await engine.sleep()


async def test_a_replica_that_leaves_asleep_is_absent_at_once(made: Made) -> None:
    class EndsSlowly(Hanging):
        async def close(self) -> None:
            await super().close()
            await asyncio.sleep(1)

    engine = SupervisedEngine("e", lambda grant: EndsSlowly("e", lambda request: WORDS, grant=grant))
    await engine.start()
    await engine.sleep()
    leaving = asyncio.create_task(engine.leave())
    await asyncio.sleep(0.1)
    assert engine.state is EngineState.ABSENT
    waking = asyncio.create_task(engine.wake())
    await leaving
    assert not waking.done()
    await waking
    assert engine.is_ready
    await engine.close()


async def test_a_cancelled_sleep_leaves_the_engine_serving(engine: SupervisedEngine, replicas: Replicas) -> None:
    running = asyncio.create_task(reply(replicas))
    await asyncio.sleep(0.02)
    asleep = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0.01)
    asleep.cancel()
    held = asyncio.create_task(reply(replicas))
    assert text(await held) == text(await running) == WORDS
    with pytest.raises(EngineError, match="ready and cannot wake"):
        await engine.wake()


async def test_an_engine_whose_admission_is_paused_finishes_its_requests_before_it_sleeps(
    engine: SupervisedEngine,
    replicas: Replicas,
) -> None:
    running = replicas.generate(REQUEST)
    chunks = [await anext(running)]
    await engine.resize(Grant(1.0, 0, 2048, preempt=True))
    asleep = asyncio.create_task(engine.sleep())
    chunks += [chunk async for chunk in running]
    assert text(chunks) == WORDS
    await asleep


async def test_an_engine_that_dies_while_it_drains_is_not_restarted_until_it_wakes(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    running = asyncio.create_task(reply(replicas))
    await asyncio.sleep(0.02)
    asleep = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0.01)
    made.engines[0].kill()
    await asleep
    await asyncio.sleep(5)
    assert (len(made.engines), engine.stats().state) == (1, EngineState.COLD)
    await engine.wake()
    assert text(await running) == WORDS


async def test_wakes_are_repeated_and_do_not_count_as_restarts(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    await engine.sleep()
    made.fail_to_start = 1
    held = asyncio.create_task(reply(replicas))
    await engine.wake()
    assert text(await held) == WORDS
    assert EngineState.DEAD not in made.states
    for _ in range(2 * QUICK.restarts):
        await engine.sleep()
        await engine.wake()
    assert text(await reply(replicas)) == WORDS


async def test_an_engine_that_does_not_wake_fails(engine: SupervisedEngine, replicas: Replicas, made: Made) -> None:
    await engine.sleep()
    made.fail_to_start = 100
    held = asyncio.create_task(reply(replicas))
    with pytest.raises(EngineError, match="no memory left"):
        await engine.wake()
    assert engine.stats().state is EngineState.FAILED
    with pytest.raises(EngineDead, match="does not wake: no memory left"):
        await held


async def test_an_engine_on_a_gpu_keeps_its_process_unless_its_sleep_is_deep() -> None:
    made: list[FakeEngine] = []

    def make(grant: Grant | None) -> FakeEngine:
        times = ServiceTime(step_s=0.01, start_s=30, sleep_s=0.5, wake_s=0.3)
        made.append(FakeEngine("e", lambda request: WORDS, times=times, time_scale=1, grant=grant, naps=True))
        return made[-1]

    async with SupervisedEngine("e", make) as engine:
        await engine.sleep()
        assert engine.stats().state is EngineState.ASLEEP
        assert engine.stats().wake_s == pytest.approx(0.5)  # as long as the sleep, until it has woken
        await engine.wake()
        assert text(await reply(Replicas("e", [engine]))) == WORDS
        assert len(made) == 1
        assert (engine.stats().sleep_s, engine.stats().wake_s) == pytest.approx((0.5, 0.3))
        await engine.sleep(deep=True)
        assert engine.stats().state is EngineState.COLD
        assert engine.stats().wake_s == pytest.approx(30)
        await engine.wake()
        assert len(made) == 2


class OnGpu:
    """Makes engines that keep their process while they sleep: 100 bytes, 60 of them weights."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []

    def make(self, grant: Grant | None) -> FakeEngine:
        memory = FakeMemory(asleep=40)
        engine = FakeEngine("e", lambda request: WORDS, time_scale=1, memory=memory, grant=grant, naps=True)
        self.engines.append(engine)
        return engine


async def test_a_sleeping_process_is_charged_for_what_it_keeps() -> None:
    async with SupervisedEngine("e", OnGpu().make) as engine:
        await engine.sleep()
        assert engine.held_bytes == 40
        await asyncio.sleep(10)
        asleep = engine.usage.spent()[Held.ASLEEP]
        assert (asleep.seconds, asleep.byte_seconds) == pytest.approx((10, 400))


@pytest.mark.parametrize("room", [59, 60])
async def test_an_engine_whose_weights_do_not_fit_the_host_ends_its_process(room: int) -> None:
    host, made = Ledger(room), OnGpu()
    async with SupervisedEngine("e", made.make, host=host) as engine:
        for _ in range(2):
            await engine.sleep()
            assert engine.stats().state is (EngineState.ASLEEP if room == 60 else EngineState.COLD)
            assert host.held["e"] == (60 if room == 60 else 0)
            await engine.wake()
        assert host.held["e"] == (60 if room == 60 else 0)  # the copy is kept
        assert text(await reply(Replicas("e", [engine]))) == WORDS
    assert host.held["e"] == 0


async def test_a_process_that_dies_asleep_leaves_a_cold_engine() -> None:
    host, made = Ledger(60), OnGpu()
    async with SupervisedEngine("e", made.make, host=host) as engine:
        await engine.sleep()
        made.engines[0].kill()
        await asyncio.sleep(5)
        assert (engine.stats().state, engine.held_bytes, len(made.engines)) == (EngineState.COLD, 0, 1)
        assert host.held["e"] == 0
        before = engine.usage.spent()[Held.ASLEEP].byte_seconds
        await asyncio.sleep(5)
        assert engine.usage.spent()[Held.ASLEEP].byte_seconds == before
        held = asyncio.create_task(reply(Replicas("e", [engine])))
        await engine.wake()
        assert text(await held) == WORDS
        assert (len(made.engines), host.held["e"]) == (2, 0)


@pytest.mark.parametrize("move", ["sleep", "wake"])
async def test_an_engine_that_hangs_while_it_moves_is_ended(move: str) -> None:
    made = OnGpu()
    async with SupervisedEngine("e", made.make, patience=QUICK) as engine:
        if move == "wake":
            await engine.sleep()

        async def hang(*arguments: object) -> None:
            await asyncio.Event().wait()

        setattr(made.engines[0], move, hang)
        if move == "sleep":
            await engine.sleep()
            assert engine.stats().state is EngineState.COLD
        await engine.wake()
        assert text(await reply(Replicas("e", [engine]))) == WORDS
        assert len(made.engines) == 2


async def test_a_pause_that_arrives_while_the_engine_begins_to_drain_does_not_stop_it(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    answer = made.engines[0].resize

    async def slow(grant: Grant, grace_s: float = 0) -> Any:
        await asyncio.sleep(0.05)
        return await answer(grant, grace_s)

    made.engines[0].resize = slow  # type: ignore[method-assign]
    pausing = asyncio.create_task(engine.resize(Grant(1.0, 0, 2048)))
    await asyncio.sleep(0.01)
    replies = [asyncio.create_task(reply(replicas)) for _ in range(3)]
    await asyncio.sleep(0.01)
    await engine.sleep()
    await pausing
    await engine.wake()
    assert [text(each) for each in await asyncio.gather(*replies)] == [WORDS] * 3


async def test_requests_without_a_token_are_held_while_the_engine_drains(
    engine: SupervisedEngine, replicas: Replicas, made: Made
) -> None:
    await engine.resize(Grant(1.0, 1, 2048))
    running = replicas.generate(REQUEST)
    chunks = [await anext(running)]
    queued = [asyncio.create_task(reply(replicas)) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert engine.stats().waiting == 5
    asleep = asyncio.create_task(engine.sleep())
    chunks += [chunk async for chunk in running]
    assert text(chunks) == WORDS
    await asleep
    assert engine.stats().state is EngineState.COLD
    assert not any(task.done() for task in queued)
    sent = [request.request_id for request in made.requests]
    assert len(sent) == 6
    await engine.wake()
    assert [text(each) for each in await asyncio.gather(*queued)] == [WORDS] * 5
    assert len(made.requests) == 11
    assert {request.request_id for request in made.requests[6:]} == {f"{REQUEST.request_id}~1"}


async def test_an_engine_that_drains_for_too_long_goes_on_serving(
    engine: SupervisedEngine, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "DRAIN_S", 1.0)
    stalled = replicas.generate(REQUEST)
    await anext(stalled)
    with pytest.raises(EngineError, match="still serves requests after 1 s"):
        await engine.sleep()
    assert text(await reply(replicas)) == WORDS
    await stalled.aclose()
    await engine.sleep()
