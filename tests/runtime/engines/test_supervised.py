"""An engine that dies is restarted, and its callers notice only a pause."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from agents.role import Message
from runtime.engines import quarantine, supervised
from runtime.engines.fake import FakeEngine, FakeMemory, ServiceTime
from runtime.engines.grant import Grant, Rejected
from runtime.engines.handle import EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.supervised import Patience, SupervisedEngine
from runtime.engines.usage import Held
from runtime.errors import EngineDead, EngineError, RequestQuarantined

pytestmark = pytest.mark.virtual_time

WORDS = "one two three four five six seven eight"
REQUEST = GenerateRequest("r", (Message("user", "go on"),), 0.0, 1.0, 100)
POISON = replace(REQUEST, messages=(Message("user", "poison"),))
QUICK = Patience(hang_s=0.2, pulse_every_s=0.02, backoff_s=(0, 0.01), restarts=4, within_s=60)


class Hanging(FakeEngine):
    """An engine that gives no token and no pulse while `hangs` is set."""

    hangs = False
    fails_to_start = False

    async def start(self) -> None:
        if self.fails_to_start:
            raise EngineError("no memory left")
        await super().start()

    async def pulse(self) -> None:
        while self.hangs:
            await asyncio.sleep(0.01)
            self._check()
        await super().pulse()

    async def _spend(self, seconds: float) -> None:
        while self.hangs:
            await asyncio.sleep(0.01)
            self._check()
        await super()._spend(seconds)


@dataclass
class Made:
    """What the supervisor did: the engines that it made, their first grants, the requests, and the reported states.

    The first `fail_to_start` restarts fail. With `drift`, restarted engines reply differently.
    """

    engines: list[Hanging] = field(default_factory=list)
    grants: list[Grant | None] = field(default_factory=list)
    states: list[EngineState] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    fail_to_start: int = 0
    drift: bool = False

    def make(self, grant: Grant | None) -> Hanging:
        number = len(self.engines)

        def script(request: GenerateRequest) -> str:
            self.requests.append(request)
            match request.messages[0].content:
                case "poison":
                    self.engines[-1].crash()
                case "kill":
                    self.engines[-1].kill()
            return WORDS.replace("two", "zwei") if self.drift and number else WORDS

        engine = Hanging("e", script, times=ServiceTime(step_s=0.01, token_s=0), time_scale=1, grant=grant)
        engine.fails_to_start = 0 < number <= self.fail_to_start
        self.engines.append(engine)
        self.grants.append(grant)
        return engine


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
async def engine(made: Made) -> AsyncIterator[SupervisedEngine]:
    async with SupervisedEngine("e", made.make, made.states.append, QUICK) as supervised:
        yield supervised


async def reply(engine: SupervisedEngine, request: GenerateRequest = REQUEST) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("how", [{}, {"schema": {"type": "object"}}, {"schema": {}, "temperature": 1.0}])
async def test_a_reply_continues_after_what_the_dead_engine_streamed(
    engine: SupervisedEngine, made: Made, after: int, how: dict[str, Any]
) -> None:
    chunks = []
    async for chunk in engine.generate(replace(REQUEST, **how)):
        chunks.append(chunk)
        if len(chunks) == after:
            made.engines[0].kill()
    assert text(chunks) == WORDS
    undisturbed = await reply(engine)  # by the restarted engine, if there was a restart
    assert [t for chunk in chunks for t in chunk.token_ids] == [t for chunk in undisturbed for t in chunk.token_ids]
    assert chunks[-1].finish == "stop"
    assert len(made.engines) == (1 if after == 0 else 2)


async def test_a_reply_is_resumed_without_a_schema_and_replayed_with_its_seed_with_one(
    engine: SupervisedEngine, made: Made
) -> None:
    for schema in (None, {"type": "object"}):
        made.requests.clear()
        seen = 0
        async for _ in engine.generate(replace(REQUEST, schema=schema, temperature=1.0)):
            seen += 1
            if seen == 3:
                engine.kill()
        first, second = made.requests
        assert len(second.resume_tokens) == (3 if schema is None else 0)
        assert first.seed == second.seed
        assert (first.seed is None) == (schema is None)
        assert first.request_id != second.request_id


async def test_a_replay_with_different_tokens_raises_an_error(engine: SupervisedEngine, made: Made) -> None:
    made.drift = True
    seen: list[Chunk] = []

    async def disturbed() -> None:
        async for chunk in engine.generate(replace(REQUEST, schema={})):
            seen.append(chunk)
            if len(seen) == 3:
                engine.kill()

    with pytest.raises(EngineError, match="generated different tokens after its restart"):
        await disturbed()
    assert text(seen) == "one two three"


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


async def test_requests_wait_during_a_restart(engine: SupervisedEngine, made: Made) -> None:
    made.fail_to_start = 2
    engine.kill()
    replies = await asyncio.gather(*(reply(engine) for _ in range(20)))
    assert {text(chunks) for chunks in replies} == {WORDS}
    assert len(made.engines) == 4


async def test_a_hanging_engine_is_killed_and_its_requests_are_sent_again(engine: SupervisedEngine, made: Made) -> None:
    task = asyncio.create_task(reply(engine))
    await asyncio.sleep(0.03)
    made.engines[0].hangs = True
    assert text(await task) == WORDS
    assert made.engines[0].stats().state is EngineState.CLOSED


async def test_an_engine_that_keeps_dying_fails_with_the_reason(engine: SupervisedEngine, made: Made) -> None:
    made.fail_to_start = 100
    engine.kill()
    with pytest.raises(EngineError, match=r"e keeps failing: 4 restarts within 60 s; no memory left"):
        await reply(engine)
    assert engine.stats().state is EngineState.FAILED
    assert made.states[-1] is EngineState.FAILED
    with pytest.raises(EngineError, match="keeps failing"):
        await reply(engine)
    outcome = await engine.resize(Grant(0.5, 7, 100))
    assert "keeps failing" in getattr(outcome, "reason", "")


async def test_a_request_that_was_alone_in_a_crash_is_quarantined(engine: SupervisedEngine, made: Made) -> None:
    with pytest.raises(RequestQuarantined, match="engine e crashed; this request is the likeliest cause"):
        await reply(engine, POISON)
    assert text(await reply(engine)) == WORDS
    assert len(made.requests) == len(made.engines) == 2


async def test_a_request_that_was_alone_when_its_engine_was_killed_is_sent_again(
    engine: SupervisedEngine, made: Made
) -> None:
    chunks = []
    async for chunk in engine.generate(REQUEST):
        chunks.append(chunk)
        if len(made.engines) < 4:
            engine.kill()
    assert text(chunks) == WORDS


async def test_a_request_is_quarantined_after_three_killed_engines(engine: SupervisedEngine, made: Made) -> None:
    """The kernel's OOM killer, for example, kills an engine whose request needs too much memory."""
    with pytest.raises(RequestQuarantined, match="engine e was killed; this request is the likeliest cause"):
        await reply(engine, replace(POISON, messages=(Message("user", "kill"),)))
    assert len(made.requests) == 3


@pytest.mark.parametrize("poisons", [1, 2])
async def test_poison_requests_are_found_and_the_others_are_served(
    engine: SupervisedEngine, made: Made, poisons: int
) -> None:
    """It takes one crash for all requests together and one for each poison: too few for the engine to fail."""
    streaming = asyncio.create_task(reply(engine))
    while not made.requests:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    waiting = [asyncio.create_task(reply(engine)) for _ in range(10)]
    poison = [asyncio.create_task(reply(engine, POISON)) for _ in range(poisons)]
    late = [asyncio.create_task(reply(engine)) for _ in range(10)]
    outcomes = await asyncio.gather(*poison, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RequestQuarantined] * poisons
    assert {text(chunks) for chunks in await asyncio.gather(streaming, *waiting, *late)} == {WORDS}
    assert len(made.engines) <= 2 + poisons
    assert engine.stats().state is EngineState.READY


async def test_a_request_that_crashes_engines_after_its_first_token_is_found(
    engine: SupervisedEngine, made: Made
) -> None:
    async def poison() -> None:
        async for chunk in engine.generate(REQUEST):
            if chunk.text != WORDS.split()[0]:
                made.engines[-1].crash()

    others = [asyncio.create_task(reply(engine)) for _ in range(5)]
    with pytest.raises(RequestQuarantined):
        await poison()
    assert {text(chunks) for chunks in await asyncio.gather(*others)} == {WORDS}
    assert len(made.engines) <= 4


async def test_the_only_request_without_a_token_is_not_blamed_beside_another(
    engine: SupervisedEngine, made: Made
) -> None:
    """It is the only request without a token, but it is not alone in the engine."""
    late_crasher = engine.generate(REQUEST)
    await anext(late_crasher)
    other = asyncio.create_task(reply(engine))
    while len(made.requests) < 2:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    made.engines[-1].crash()
    assert text(await other) == WORDS
    assert text([chunk async for chunk in late_crasher]) == WORDS.removeprefix(WORDS.split()[0])


async def test_a_killed_engine_does_not_add_suspicion_in_a_later_crash(engine: SupervisedEngine, made: Made) -> None:
    innocent = asyncio.create_task(reply(engine))
    while not made.requests:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    engine.kill()
    others = [asyncio.create_task(reply(engine)) for _ in range(3)]
    poison = asyncio.create_task(reply(engine, POISON))
    assert {text(chunks) for chunks in await asyncio.gather(innocent, *others)} == {WORDS}
    with pytest.raises(RequestQuarantined):
        await poison


async def test_a_reader_that_stops_reading_delays_the_line_by_one_turn_at_most(
    engine: SupervisedEngine, made: Made
) -> None:
    stalled, other = engine.generate(REQUEST), engine.generate(REQUEST)
    for _ in range(2):
        await anext(stalled)
        await anext(other)
        made.engines[-1].crash()
    await anext(stalled)  # it is suspected to crash engines late, so that its turn lasts until its reply ends
    await other.aclose()
    async with asyncio.timeout(quarantine.TURN_S + 1):
        assert text(await reply(engine)) == WORDS
    await stalled.aclose()


async def test_requests_in_the_quarantine_line_count_as_waiting(engine: SupervisedEngine, made: Made) -> None:
    tasks = [asyncio.create_task(reply(engine)) for _ in range(10)]
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
    task = asyncio.create_task(reply(supervised))
    while not made.requests:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0)
    await supervised.close()
    with pytest.raises(EngineDead, match="e is closed"):
        await task


async def test_a_cancelled_suspect_does_not_block_the_line(engine: SupervisedEngine, made: Made) -> None:
    tasks = [asyncio.create_task(reply(engine)) for _ in range(5)]
    await asyncio.sleep(0)
    made.engines[0].crash()
    await asyncio.sleep(0)
    for task in tasks[:4]:
        task.cancel()
    assert text(await tasks[4]) == WORDS
    assert {text(chunks) for chunks in await asyncio.gather(*(reply(engine) for _ in range(5)))} == {WORDS}


def test_a_reply_with_stop_strings_cannot_be_resumed() -> None:
    """vLLM holds back the last characters of its tokens, because they may be the beginning of a stop string."""
    assert REQUEST.resumable
    assert not replace(REQUEST, stop=("x",)).resumable


@pytest.mark.parametrize("sampling_params", [{"frequency_penalty": 0.5}, {"presence_penalty": 0.5}])
async def test_a_reply_with_penalties_is_replayed(
    engine: SupervisedEngine, made: Made, sampling_params: dict[str, Any]
) -> None:
    """Penalties would treat tokens that are appended to the prompt as part of the prompt."""
    chunks = []
    async for chunk in engine.generate(replace(REQUEST, sampling_params=sampling_params)):
        chunks.append(chunk)
        if len(chunks) == 3:
            engine.kill()
    assert text(chunks) == WORDS
    assert [request.resume_tokens for request in made.requests] == [(), ()]


async def test_all_requests_in_flight_survive_two_kills(engine: SupervisedEngine, made: Made) -> None:
    tasks = [asyncio.create_task(reply(engine)) for _ in range(50)]
    for _ in range(2):
        await asyncio.sleep(0.04)
        engine.kill()
    assert {text(chunks) for chunks in await asyncio.gather(*tasks)} == {WORDS}


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
    waiting = asyncio.create_task(reply(supervised))
    await asyncio.sleep(0.05)
    await supervised.close()
    with pytest.raises(EngineError, match="e is closed"):
        await waiting


async def test_an_engine_sleeps_after_its_requests_and_wakes_for_those_that_it_held(
    engine: SupervisedEngine, made: Made
) -> None:
    running = asyncio.create_task(reply(engine))
    await asyncio.sleep(0.02)
    asleep = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0)
    assert engine.stats().state is EngineState.DRAINING
    held = asyncio.create_task(reply(engine))
    await asleep
    assert text(running.result()) == WORDS
    assert (engine.stats().state, engine.stats().waiting) == (EngineState.COLD, 1)
    assert made.engines[0].stats().state is EngineState.CLOSED
    await asyncio.sleep(10)  # no pulse restarts it, and no request times out
    assert len(made.engines) == 1
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


async def test_a_cancelled_sleep_leaves_the_engine_serving(engine: SupervisedEngine) -> None:
    running = asyncio.create_task(reply(engine))
    await asyncio.sleep(0.02)
    asleep = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0.01)
    asleep.cancel()
    held = asyncio.create_task(reply(engine))
    assert text(await held) == text(await running) == WORDS
    with pytest.raises(EngineError, match="ready and cannot wake"):
        await engine.wake()


async def test_an_engine_whose_admission_is_paused_finishes_its_requests_before_it_sleeps(
    engine: SupervisedEngine,
) -> None:
    running = engine.generate(REQUEST)
    chunks = [await anext(running)]
    await engine.resize(Grant(1.0, 0, 2048, preempt=True))
    asleep = asyncio.create_task(engine.sleep())
    chunks += [chunk async for chunk in running]
    assert text(chunks) == WORDS
    await asleep


async def test_an_engine_that_dies_while_it_drains_is_not_restarted_until_it_wakes(
    engine: SupervisedEngine, made: Made
) -> None:
    running = asyncio.create_task(reply(engine))
    await asyncio.sleep(0.02)
    asleep = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0.01)
    made.engines[0].kill()
    await asleep
    await asyncio.sleep(5)
    assert (len(made.engines), engine.stats().state) == (1, EngineState.COLD)
    await engine.wake()
    assert text(await running) == WORDS


async def test_wakes_are_repeated_and_do_not_count_as_restarts(engine: SupervisedEngine, made: Made) -> None:
    await engine.sleep()
    made.fail_to_start = 1
    held = asyncio.create_task(reply(engine))
    await engine.wake()
    assert text(await held) == WORDS
    assert EngineState.DEAD not in made.states
    for _ in range(2 * QUICK.restarts):
        await engine.sleep()
        await engine.wake()
    assert text(await reply(engine)) == WORDS


async def test_an_engine_that_does_not_wake_fails(engine: SupervisedEngine, made: Made) -> None:
    await engine.sleep()
    made.fail_to_start = 100
    held = asyncio.create_task(reply(engine))
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
        assert text(await reply(engine)) == WORDS
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
        assert text(await reply(engine)) == WORDS
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
        held = asyncio.create_task(reply(engine))
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
        assert text(await reply(engine)) == WORDS
        assert len(made.engines) == 2


async def test_a_pause_that_arrives_while_the_engine_begins_to_drain_does_not_stop_it(
    engine: SupervisedEngine, made: Made
) -> None:
    answer = made.engines[0].resize

    async def slow(grant: Grant, grace_s: float = 0) -> Any:
        await asyncio.sleep(0.05)
        return await answer(grant, grace_s)

    made.engines[0].resize = slow  # type: ignore[method-assign]
    pausing = asyncio.create_task(engine.resize(Grant(1.0, 0, 2048)))
    await asyncio.sleep(0.01)
    replies = [asyncio.create_task(reply(engine)) for _ in range(3)]
    await asyncio.sleep(0.01)
    await engine.sleep()
    await pausing
    await engine.wake()
    assert [text(each) for each in await asyncio.gather(*replies)] == [WORDS] * 3


async def test_requests_without_a_token_are_held_while_the_engine_drains(engine: SupervisedEngine, made: Made) -> None:
    await engine.resize(Grant(1.0, 1, 2048))
    running = engine.generate(REQUEST)
    chunks = [await anext(running)]
    queued = [asyncio.create_task(reply(engine)) for _ in range(5)]
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
    engine: SupervisedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "DRAIN_S", 1.0)
    stalled = engine.generate(REQUEST)
    await anext(stalled)
    with pytest.raises(EngineError, match="still serves requests after 1 s"):
        await engine.sleep()
    assert text(await reply(engine)) == WORDS
    await stalled.aclose()
    await engine.sleep()
