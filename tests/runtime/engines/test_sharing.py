"""Memory moves between engines and stays within the budget at every instant, whatever fails on the way."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.engines import sharing
from runtime.engines.fake import FakeEngine, FakeMemory
from runtime.engines.grant import Applied, Deferred, Grant, Rejected, ResizeOutcome, Superseded
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import Patience, SupervisedEngine
from runtime.errors import EngineError
from runtime.simulation.virtual_time import VirtualLoop

pytestmark = pytest.mark.virtual_time

MIB = 1 << 20
DEVICE = 1000 * MIB
MEMORY = FakeMemory(device=DEVICE, fixed=100 * MIB, floor=50 * MIB)
FLOOR = 0.15
T = TypeVar("T")


class Device:
    """The physical memory. `most` is the largest sum that its engines ever held."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.most = 0

    def hold(self, engine: str, nbytes: int) -> None:
        self.held[engine] = nbytes
        self.most = max(self.most, sum(self.held.values()))


class Physical(FakeEngine):
    """A fake engine that takes its memory from a device and fails in the way that `fault` says.

    - "silent": it does not answer until `speaks` is set.
    - "out of memory": it cannot grow.
    - "dead": it rejects every grant.
    - "busy": it releases half of a shrink immediately and the rest in `let_go`.
    """

    def __init__(self, name: str, device: Device, grant: Grant) -> None:
        super().__init__(name, lambda request: "x", memory=MEMORY, grant=grant)
        self.device = device
        self.fault: str | None = None
        self.holding: list[Deferred] = []
        self.speaks = asyncio.Event()
        device.hold(name, int(grant.gpu_memory_utilization * DEVICE))

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        more = int(grant.gpu_memory_utilization * DEVICE) - self.device.held[self.name]
        await asyncio.sleep(0)
        if self.fault == "silent":
            await self.speaks.wait()
        if self.fault == "out of memory" and more > 0:
            return Rejected(grant, "the GPU is out of memory")
        if self.fault == "dead":
            return Rejected(grant, "it died")
        self.let_go(Superseded)
        if self.fault == "busy" and more < 0:
            self.grant = grant
            loop = asyncio.get_running_loop()
            held = -more // 2
            self.device.hold(self.name, int(grant.gpu_memory_utilization * DEVICE) + held)
            self.holding.append(Deferred(grant, held, grace_s, loop.create_future()))
            return self.holding[-1]
        outcome = await super().resize(grant)
        self.device.hold(self.name, int(grant.gpu_memory_utilization * DEVICE))
        return outcome

    def let_go(self, how: type) -> None:
        """Settle the deferred shrinks as Applied, as Superseded, or as Rejected because the engine died."""
        while self.holding:
            deferred = self.holding.pop()
            if how is not Superseded:
                self.device.hold(self.name, int(deferred.grant.gpu_memory_utilization * DEVICE))
            outcomes: dict[type, Applied | Rejected | Superseded] = {
                Applied: Applied(deferred.grant, 0, 0, 0, 0, 0),
                Rejected: Rejected(deferred.grant, "it died"),
                Superseded: Superseded(deferred.grant),
            }
            deferred.settled.set_result(outcomes[how])


def grant(share: float) -> Grant:
    return Grant(share, 64, 2048)


class Three:
    """Three engines that hold 0.3, 0.4 and 0.3 of a device, which is therefore full."""

    def __init__(self, budget: int = DEVICE) -> None:
        self.device = Device()
        self.engines = {
            name: Physical(name, self.device, grant(share)) for name, share in (("a", 0.3), ("b", 0.4), ("c", 0.3))
        }
        self.ledger = Ledger(budget)
        for name, held in self.device.held.items():
            self.ledger.claim(name, held)
        self.sharing = Sharing(self.engines, self.ledger)

    async def start(self) -> "Three":
        for engine in self.engines.values():
            await engine.start()
        return self


@pytest.fixture
async def three() -> Three:
    return await Three().start()


def shares(three: Three) -> dict[str, float]:
    return {name: round(held / DEVICE, 3) for name, held in three.device.held.items()}


async def test_memory_moves_from_donors_to_recipients(three: Three) -> None:
    outcomes = await three.sharing.resize({"a": grant(0.5), "b": grant(0.2)})
    assert all(isinstance(outcome, Applied) for outcome in outcomes.values())
    assert shares(three) == {"a": 0.5, "b": 0.2, "c": 0.3}
    assert three.ledger.held == three.device.held
    assert three.device.most == DEVICE


@pytest.mark.parametrize(
    ("grants", "reason"),
    [
        ({"a": 0.1}, "floor of 0.15"),
        ({"a": -1.0}, "floor"),
        ({"a": float("nan")}, "floor"),
        ({"a": float("inf")}, "floor"),
        ({"a": 1.5}, "ceiling of 1"),
        ({"d": 0.3}, "there is no engine 'd'"),
        ({"a": 0.5}, "the budget is"),
        ({"b": 0.2, "a": 0.6}, "the budget is"),
    ],
)
async def test_an_impossible_decision_is_rejected_and_changes_nothing(
    three: Three, grants: dict[str, float], reason: str
) -> None:
    outcomes = await three.sharing.resize({name: grant(share) for name, share in grants.items()})
    reasons = [outcome.reason for outcome in outcomes.values() if isinstance(outcome, Rejected)]
    assert len(reasons) == len(grants)
    assert any(reason in given for given in reasons)
    assert shares(three) == {"a": 0.3, "b": 0.4, "c": 0.3}


@pytest.mark.parametrize(("seqs", "tokens"), [(65, 2048), (-1, 2048), (64, 0), (64, 4096)])
async def test_concurrency_outside_its_bounds_is_rejected(three: Three, seqs: int, tokens: int) -> None:
    outcome = (await three.sharing.resize({"a": Grant(0.3, seqs, tokens)}))["a"]
    assert isinstance(outcome, Rejected)
    assert "is not within" in outcome.reason


async def test_a_recipient_grows_as_its_donor_releases_memory(three: Three) -> None:
    three.engines["b"].fault = "busy"
    outcomes = await three.sharing.resize({"a": grant(0.6), "b": grant(0.2), "c": grant(0.2)})
    assert isinstance(outcomes["c"], Applied)
    waiting, donor = outcomes["a"], outcomes["b"]
    assert isinstance(waiting, Deferred)
    assert isinstance(donor, Deferred)
    assert shares(three) == {"a": 0.5, "b": 0.3, "c": 0.2}  # half of the donor's memory was free and has moved
    three.engines["b"].let_go(Applied)
    assert (await waiting.settled).grant == grant(0.6)
    assert shares(three) == {"a": 0.6, "b": 0.2, "c": 0.2}
    assert three.device.most == DEVICE


async def test_a_newer_grant_supersedes_a_waiting_one(three: Three) -> None:
    three.engines["b"].fault = "busy"
    first = await three.sharing.resize({"a": grant(0.5), "b": grant(0.2)})
    second = await three.sharing.resize({"a": grant(0.2)})
    assert isinstance(second["a"], Applied)
    assert isinstance(first["a"], Deferred)
    assert isinstance(await first["a"].settled, Superseded)
    three.engines["b"].let_go(Applied)
    await asyncio.sleep(0.01)
    assert shares(three) == {"a": 0.2, "b": 0.2, "c": 0.3}
    assert three.ledger.held == three.device.held


async def test_memory_that_a_donor_has_yet_to_release_can_be_granted(three: Three) -> None:
    three.engines["b"].fault = "busy"
    await three.sharing.resize({"b": grant(0.2)})
    waiting = (await three.sharing.resize({"a": grant(0.5)}))["a"]
    assert isinstance(waiting, Deferred)
    three.engines["b"].let_go(Applied)
    assert isinstance(await waiting.settled, Applied)
    assert shares(three) == {"a": 0.5, "b": 0.2, "c": 0.3}


async def test_donors_get_their_memory_back_if_the_recipient_fails(three: Three) -> None:
    three.engines["a"].fault = "out of memory"
    outcomes = await three.sharing.resize({"a": grant(0.5), "b": grant(0.2)})
    assert isinstance(outcomes["a"], Rejected)
    assert isinstance(outcomes["b"], Rejected)
    assert "rolled back" in outcomes["b"].reason
    assert shares(three) == {"a": 0.3, "b": 0.4, "c": 0.3}
    assert three.ledger.held == three.device.held


async def test_recipients_grow_concurrently(three: Three) -> None:
    three.engines["a"].fault = "silent"
    resize = asyncio.create_task(three.sharing.resize({"a": grant(0.4), "b": grant(0.2), "c": grant(0.4)}))
    await asyncio.wait([resize], timeout=0.05)
    assert shares(three) == {"a": 0.3, "b": 0.2, "c": 0.4}
    three.engines["a"].speaks.set()
    assert all(isinstance(outcome, Applied) for outcome in (await resize).values())


async def test_if_one_recipient_fails_the_other_keeps_its_part_and_the_rest_is_returned(three: Three) -> None:
    three.engines["a"].fault = "out of memory"
    outcomes = await three.sharing.resize({"a": grant(0.4), "b": grant(0.2), "c": grant(0.4)})
    assert {name: type(outcome) for name, outcome in outcomes.items()} == {"a": Rejected, "b": Rejected, "c": Applied}
    assert shares(three) == {"a": 0.3, "b": 0.3, "c": 0.4}
    assert three.ledger.held == three.device.held
    assert three.device.most <= DEVICE


async def test_a_recipient_is_rejected_if_its_donor_releases_nothing(three: Three) -> None:
    three.engines["b"].fault = "dead"
    outcomes = await three.sharing.resize({"a": grant(0.5), "b": grant(0.2)})
    assert isinstance(outcomes["b"], Rejected)
    assert isinstance(outcomes["a"], Rejected)
    assert "donors released too little memory" in outcomes["a"].reason
    assert shares(three) == {"a": 0.3, "b": 0.4, "c": 0.3}


async def test_after_a_budget_cut_only_shrinking_is_possible(three: Three) -> None:
    three.ledger.budget_bytes = DEVICE // 2
    assert isinstance((await three.sharing.resize({"a": grant(0.35)}))["a"], Rejected)
    assert isinstance((await three.sharing.resize({"a": grant(0.2)}))["a"], Applied)


@pytest.mark.parametrize("after", [None, "dead", "busy"])
async def test_memory_moves_between_the_others_while_an_engine_does_not_answer(
    three: Three, monkeypatch: pytest.MonkeyPatch, after: str | None
) -> None:
    monkeypatch.setattr(sharing, "ANSWER_S", 0.01)
    silent = three.engines["b"]
    silent.fault = "silent"
    outcomes = await three.sharing.resize({"a": grant(0.5), "b": grant(0.2)})
    assert isinstance(outcomes["b"], Rejected)
    assert "has not answered for 0.01 s" in outcomes["b"].reason
    assert shares(three) == {"a": 0.3, "b": 0.4, "c": 0.3}
    assert list(three.sharing.silent) == ["b"]
    again = await three.sharing.resize({"b": grant(0.3)})
    assert "has not answered its last grant yet" in getattr(again["b"], "reason", "")
    others = await three.sharing.resize({"a": grant(0.4), "c": grant(0.2)})
    assert all(isinstance(outcome, Applied) for outcome in others.values())
    silent.fault = after
    silent.speaks.set()
    await asyncio.sleep(0.01)
    assert not three.sharing.silent
    assert three.ledger.held == three.device.held
    assert shares(three)["b"] == {None: 0.2, "dead": 0.4, "busy": 0.3}[after]


async def test_a_recipient_that_does_not_answer_keeps_its_claim(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "ANSWER_S", 0.01)
    three.engines["a"].fault = "silent"
    outcomes = await three.sharing.resize({"a": grant(0.5), "b": grant(0.2)})
    assert isinstance(outcomes["a"], Rejected)
    assert three.ledger.held["a"] == DEVICE // 2
    beyond = await three.sharing.resize({"b": grant(0.4)})
    assert "the budget is" in getattr(beyond["b"], "reason", "")
    three.engines["a"].fault = None
    three.engines["a"].speaks.set()
    await asyncio.sleep(0.01)
    assert shares(three) == {"a": 0.5, "b": 0.2, "c": 0.3}
    assert three.device.most == DEVICE
    await three.sharing.close()


async def shrinking_and_silent(three: Three, shrunk: float, then: float) -> Physical:
    """Let `b` release only a part of a shrink, then not answer a newer grant. Return it."""
    engine = three.engines["b"]
    engine.fault = "busy"
    await three.sharing.resize({"b": grant(shrunk)})
    engine.fault = "silent"
    await three.sharing.resize({"b": grant(then)})
    return engine


@pytest.mark.parametrize(("late", "share"), [(None, 0.16), ("dead", 0.15)])
async def test_a_claim_waits_for_a_silent_engine_when_an_earlier_shrink_ends_meanwhile(
    three: Three, monkeypatch: pytest.MonkeyPatch, late: str | None, share: float
) -> None:
    monkeypatch.setattr(sharing, "ANSWER_S", 0.01)
    engine = await shrinking_and_silent(three, 0.15, 0.16)
    engine.let_go(Applied)
    await asyncio.sleep(0.001)
    assert three.ledger.held["b"] > 0.16 * DEVICE
    engine.fault = late
    engine.speaks.set()
    await asyncio.sleep(0.001)
    assert shares(three)["b"] == share
    assert three.ledger.held == three.device.held


async def test_a_late_refusal_leaves_the_claim_to_an_earlier_shrink(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "ANSWER_S", 0.01)
    engine = await shrinking_and_silent(three, 0.2, 0.35)
    engine.fault = "out of memory"
    engine.speaks.set()
    await asyncio.sleep(0.001)
    assert three.ledger.held["b"] >= three.device.held["b"] > 0.2 * DEVICE
    engine.let_go(Applied)
    await asyncio.sleep(0.001)
    assert shares(three)["b"] == 0.2
    assert three.ledger.held == three.device.held


class Restarting:
    """A supervised engine `a` and a plain engine `b`, each with half of a device. `a` was killed and is restarting."""

    def __init__(self) -> None:
        self.device = Device()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.share = 0.5
        supervised = SupervisedEngine("a", self._make, patience=Patience(pulse_every_s=0.01, backoff_s=(0,)))
        self.engines: dict[str, EngineHandle] = {"a": supervised, "b": Physical("b", self.device, grant(0.5))}
        self.sharing = Sharing(self.engines, Ledger(DEVICE))

    def _make(self, had: Grant | None) -> EngineHandle:
        may_start, share = self.may_start, self.share

        class Slow(Physical):
            async def start(self) -> None:
                await may_start.wait()
                await super().start()

        return Slow("a", self.device, grant(share))

    async def start(self) -> None:
        for name, engine in self.engines.items():
            await engine.start()
            self.sharing.ledger.claim(name, DEVICE // 2)
        self.may_start.clear()
        self.engines["a"].kill()
        await self.until(EngineState.STARTING)

    async def until(self, state: EngineState) -> None:
        async with asyncio.timeout(20):
            while self.engines["a"].stats().state is not state:  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(0.001)


@pytest.fixture
async def restarting() -> AsyncIterator[Restarting]:
    engines = Restarting()
    await engines.start()
    yield engines
    await engines.engines["a"].close()


async def test_memory_moves_between_the_others_while_an_engine_restarts(restarting: Restarting) -> None:
    sharing = restarting.sharing
    assert restarting.engines["a"].limits.device_bytes == DEVICE  # the limits from before the restart
    shrunk = await sharing.resize({"b": grant(0.3)})
    assert isinstance(shrunk["b"], Applied)
    assert "the budget is" in getattr((await sharing.resize({"b": grant(0.6)}))["b"], "reason", "")
    assert isinstance((await sharing.resize({"b": grant(0.5)}))["b"], Applied)
    assert "engine a is starting" in getattr((await sharing.resize({"a": grant(0.4)}))["a"], "reason", "")
    restarting.may_start.set()
    await restarting.until(EngineState.READY)
    assert isinstance((await sharing.resize({"a": grant(0.4)}))["a"], Applied)


@pytest.mark.parametrize("wakes", [False, True], ids=["it waits for memory", "it starts"])
async def test_a_second_call_that_wakes_an_engine_changes_no_claim(wakes: bool) -> None:
    device = Device()

    def make(grant: Grant | None) -> Physical:
        return Physical("b", device, grant or Grant(FLOOR, 64, 2048))

    a, b = Physical("a", device, Grant(0.9, 64, 2048)), SupervisedEngine("b", make)
    await a.start()
    b.begin_absent(a.limits, start_s=5)
    sharing = Sharing({"a": a, "b": b}, Ledger(DEVICE))
    sharing.ledger.claim("a", int(0.9 * DEVICE))
    sharing.ledger.record("b", 0)
    first = asyncio.create_task(sharing.wake("b", 60))
    await asyncio.sleep(1)
    if wakes:
        await sharing.resize({"a": Grant(0.5, 64, 2048)})
    with pytest.raises(EngineError, match=r"engine b is (waking|ready) and cannot wake"):
        await sharing.wake("b", 60)
    await sharing.release("b", 0)
    await sharing.resize({"a": Grant(0.5, 64, 2048)})
    await first
    assert sharing.ledger.held["b"] == int(FLOOR * DEVICE)
    await b.close()


async def test_an_engine_that_failed_holds_no_memory() -> None:
    device = Device()
    failing = SupervisedEngine("a", lambda had: Physical("a", device, grant(0.5)), patience=Patience(restarts=0))
    await failing.start()
    sharing = Sharing({"a": failing}, Ledger(DEVICE))
    sharing.ledger.claim("a", DEVICE // 2)
    sharing.release_failed()
    assert sharing.ledger.held["a"] == DEVICE // 2
    failing.kill()
    while failing.state is not EngineState.FAILED:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.1)
    sharing.release_failed()
    assert sharing.ledger.held["a"] == 0
    await failing.close()


async def test_the_ledger_follows_an_engine_that_restarts_with_more_memory(restarting: Restarting) -> None:
    restarting.engines["a"].kill()
    restarting.share = 0.55
    await restarting.engines["a"].close()
    back = restarting._make(None)
    restarting.engines["a"] = back
    restarting.may_start.set()
    await back.start()
    await restarting.sharing.resize({"b": grant(0.4)})
    assert restarting.sharing.ledger.held == {"a": int(0.55 * DEVICE), "b": int(0.4 * DEVICE)}


class Trading(RuleBasedStateMachine):
    """Decisions, faults and late releases in any order keep the ledger true."""

    def __init__(self) -> None:
        super().__init__()
        self.answer_s, sharing.ANSWER_S = sharing.ANSWER_S, 0.005
        self.loop = VirtualLoop()
        self.three = self.wait(Three().start())
        self.deferred: list[Deferred] = []

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    @rule(shares=st.dictionaries(st.sampled_from("abc"), st.integers(10, 105).map(lambda n: n / 100), min_size=1))
    def decide(self, shares: dict[str, float]) -> None:
        before = dict(self.three.device.held)
        releasing = any(engine.holding for engine in self.three.engines.values())
        outcomes = self.wait(self.three.sharing.resize({name: grant(share) for name, share in shares.items()}))
        assert set(outcomes) == set(shares)
        if all(isinstance(o, Rejected) for o in outcomes.values()) and not releasing:
            after = self.three.device.held
            assert all(after[n] == before[n] for n in after)
        for name, outcome in outcomes.items():
            if isinstance(outcome, Deferred):
                self.deferred.append(outcome)
            elif isinstance(outcome, Applied):
                assert self.three.device.held[name] == int(outcome.grant.gpu_memory_utilization * DEVICE)

    @rule(engine=st.sampled_from("abc"), fault=st.sampled_from([None, "out of memory", "dead", "busy", "silent"]))
    def fail(self, engine: str, fault: str | None) -> None:
        self.three.engines[engine].fault = fault
        if fault == "silent":
            self.three.engines[engine].speaks.clear()
        else:
            self.speak(self.three.engines[engine])

    def speak(self, engine: Physical) -> None:
        engine.speaks.set()
        self.wait(asyncio.sleep(0.001))

    @rule(engine=st.sampled_from("abc"), how=st.sampled_from([Applied, Rejected]))
    def let_go(self, engine: str, how: type) -> None:
        self.three.engines[engine].let_go(how)
        self.wait(asyncio.sleep(0.001))

    @precondition(lambda self: self.three.sharing._one_at_a_time.locked() is False)
    @invariant()
    def the_ledger_is_true(self) -> None:
        device, ledger = self.three.device, self.three.ledger
        assert device.most <= DEVICE
        assert sum(ledger.held.values()) <= ledger.budget_bytes
        for name, held in device.held.items():
            if self.three.engines[name].holding or name in self.three.sharing.silent:
                assert ledger.held[name] >= held
            else:
                assert abs(ledger.held[name] - held) <= 1, name

    def teardown(self) -> None:
        for engine in self.three.engines.values():
            engine.fault = None
            self.speak(engine)
            engine.let_go(Applied)
        self.wait(asyncio.sleep(0.001))
        assert not self.three.sharing.silent
        assert all(deferred.settled.done() for deferred in self.deferred), "a deferred grant never settled"
        self.wait(self.three.sharing.close())
        self.loop.close()
        sharing.ANSWER_S = self.answer_s


TestTrading = Trading.TestCase
TestTrading.settings = settings(max_examples=100, stateful_step_count=25)
