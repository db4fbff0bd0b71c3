"""The keeper carries a residency policy's decisions out: nothing is lost, and the device never holds too much."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from agents.role import Message, Value
from runtime.control import catalogue as share_policies
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import Controller
from runtime.control.forecast import Forecast
from runtime.control.policy import Decision, Policy
from runtime.control.snapshot import Snapshot
from runtime.control.snapshotter import Snapshotter
from runtime.engines import replicas, supervised
from runtime.engines.fake import FakeEngine, FakeMemory, ServiceTime
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.replicas import Replicas
from runtime.engines.request import GenerateRequest
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import Patience, SupervisedEngine
from runtime.errors import EngineDead, EngineError
from runtime.events import Event, JobAdvanced, JobEnded
from runtime.residency import catalogue
from runtime.residency.call_times import CallTimes
from runtime.residency.keeper import STARVED_S, Keeper, Rules
from runtime.residency.policy import ResidencyDecision, ResidencyPolicy
from runtime.residency.snapshot import ResidencySnapshot

pytestmark = pytest.mark.virtual_time

MIB = 1 << 20
WORDS = "one two three four five six seven eight"
REQUEST = GenerateRequest("r", (Message("user", "go on"),), 0.0, 1.0, 100)
NAMES = ("planner", "solver", "critic", "judge")
SEATS = frozenset({"planner", "solver"})
START_S = 0.5
ASLEEP = 40 * MIB
"""Bytes that a sleeping engine keeps on the device. Only an engine that `naps` keeps any, with its process."""


class Device:
    """The physical memory. `most` is the largest sum that its engines ever held."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.most = 0

    def hold(self, engine: str, nbytes: int) -> None:
        self.held[engine] = nbytes
        self.most = max(self.most, sum(self.held.values()))


class Physical(FakeEngine):
    """A fake engine that takes its memory from a device, when it begins to start, and returns it at its end."""

    def __init__(self, name: str, device: Device, grant: Grant | None, naps: bool) -> None:
        super().__init__(
            name,
            lambda request: WORDS,
            times=ServiceTime(step_s=0.01, token_s=0, start_s=START_S, sleep_s=0.1, wake_s=0.2),
            time_scale=1,
            memory=FakeMemory(1000 * MIB, fixed=300 * MIB, floor=50 * MIB, token=MIB, asleep=ASLEEP),
            grant=grant or Grant(0.35, 64, 2048),
            naps=naps,
        )
        self.device = device

    def hold(self) -> None:
        self.device.hold(self.name, self._limits.held_bytes(self.grant.gpu_memory_utilization))

    async def start(self) -> None:
        self.hold()
        await super().start()

    async def resize(self, grant: Grant, grace_s: float = 0):  # type: ignore[no-untyped-def]
        outcome = await super().resize(grant, grace_s)
        self.hold()
        return outcome

    async def sleep(self, deep: bool = False) -> None:
        await super().sleep(deep)
        self.device.hold(self.name, self.held_bytes)

    async def wake(self) -> None:
        self.device.hold(self.name, self.limits.smallest_bytes)
        await super().wake()

    def _die(self, death) -> None:  # type: ignore[no-untyped-def]
        super()._die(death)
        self.device.hold(self.name, 0)

    async def close(self) -> None:
        await super().close()
        self.device.hold(self.name, 0)


@dataclass
class Rig:
    """Four engines, of which two fit the device together, with everything that moves them."""

    engines: dict[str, SupervisedEngine]
    replicas: dict[str, Replicas]
    device: Device
    keeper: Keeper
    controller: Controller
    sharing: Sharing
    listeners: tuple[Callable[[Event], None], ...]

    def tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    async def ask(self, name: str) -> str:
        request = self.replicas[name].generate(REQUEST)
        self.keeper.look()
        return "".join([chunk.text async for chunk in request])

    def states(self) -> dict[str, EngineState]:
        return {name: engine.stats().state for name, engine in self.engines.items()}

    def awake(self) -> set[str]:
        return {name for name, state in self.states().items() if state is EngineState.READY}


@asynccontextmanager
async def rig(
    policy: str | ResidencyPolicy = "lru", rules: dict[str, Rules] | None = None, naps: bool = False
) -> AsyncIterator[Rig]:
    device = Device()
    engines = {
        name: SupervisedEngine(
            name,
            lambda grant, name=name: Physical(name, device, grant, naps),  # type: ignore[misc]
            patience=Patience(hang_s=5, pulse_every_s=0.5, backoff_s=(0, *[0.1] * 9), restarts=100),
        )
        for name in NAMES
    }
    ledger = Ledger(1000 * MIB)
    for name, engine in engines.items():
        await engine.start()
        await engine.sleep()
        ledger.claim(name, engine.held_bytes)
    sharing, forecast, call_times = Sharing(engines, ledger), Forecast(), CallTimes()
    for predictor in (forecast, call_times):
        predictor.seat({name: name for name in NAMES})
    snapshotter = Snapshotter(engines, forecast)
    shares = ContainedPolicy("waterfill", share_policies.make("waterfill"))
    controller = Controller(engines, sharing, snapshotter, shares)
    chosen = catalogue.make(policy) if isinstance(policy, str) else policy
    keeper = Keeper(engines, sharing, forecast, call_times, chosen, rules, controller.wake)
    async with controller, keeper:
        listeners = (forecast.on_event, call_times.on_event)
        yield Rig(engines, replicas.gathered(engines), device, keeper, controller, sharing, listeners)
    await sharing.close()
    for engine in engines.values():
        await engine.close()


async def settle() -> None:
    await asyncio.sleep(3)


async def test_engines_that_keep_their_process_claim_what_they_keep() -> None:
    async with rig("ttl", naps=True) as made:
        for name in NAMES:
            assert await made.ask(name) == WORDS
        assert len(made.awake()) == 2
        asleep = set(NAMES) - made.awake()
        assert {made.sharing.ledger.held[name] for name in asleep} == {ASLEEP}
        victim = asleep.pop()
        made.engines[victim].kill()
        await settle()
        assert made.states()[victim] is EngineState.COLD
        assert made.sharing.ledger.held[victim] == 0
        assert await made.ask(victim) == WORDS


async def test_engines_wake_for_requests_and_make_room_for_each_other() -> None:
    async with rig() as made:
        assert made.awake() == set()
        assert await made.ask("planner") == await made.ask("solver") == WORDS
        assert made.awake() == {"planner", "solver"}
        await settle()
        assert await made.ask("critic") == WORDS
        assert made.awake() == {"solver", "critic"}
        assert made.device.most <= 1000 * MIB
        assert made.sharing.ledger.held["planner"] == 0
        assert (made.keeper.counts.wakes, made.keeper.counts.sleeps) == (3, 1)


async def test_awake_engines_shrink_for_one_that_wakes() -> None:
    async with rig() as made:
        await made.ask("planner")
        await settle()  # the planner grows to the whole device
        assert made.sharing.ledger.held["planner"] > 900 * MIB
        assert await made.ask("solver") == WORDS
        assert made.awake() == {"planner", "solver"}
        assert made.device.most <= 1000 * MIB


async def test_more_requests_than_fit_are_all_answered_in_bounded_time() -> None:
    async with rig() as made:
        asked = [made.ask(name) for name in NAMES for _ in range(5)]
        began_s = asyncio.get_running_loop().time()
        assert await asyncio.gather(*asked) == [WORDS] * 20
        assert asyncio.get_running_loop().time() - began_s < 15
        assert made.device.most <= 1000 * MIB


async def test_engines_that_are_always_busy_give_way_after_a_while() -> None:
    async with rig() as made:
        until_s = asyncio.get_running_loop().time() + 60

        async def keep_busy(name: str) -> None:
            while asyncio.get_running_loop().time() < until_s:
                await made.ask(name)

        busy = [asyncio.create_task(keep_busy(name)) for name in ("planner", "solver") for _ in range(3)]
        await asyncio.sleep(5)
        began_s = asyncio.get_running_loop().time()
        assert await made.ask("critic") == WORDS
        assert 9 < asyncio.get_running_loop().time() - began_s < 15
        await asyncio.gather(*busy)


@pytest.mark.parametrize("policy", ["lru", "job_graph"])
async def test_busy_engines_that_share_a_place_take_turns_without_thrashing(policy: str) -> None:
    async with rig(policy) as made:
        until_s = asyncio.get_running_loop().time() + 120

        async def keep_busy(name: str) -> None:
            while asyncio.get_running_loop().time() < until_s:
                await made.ask(name)

        await asyncio.gather(*(keep_busy(name) for name in NAMES[:3] for _ in range(3)))
        # Each of the three waits for about 10 s before another one gives way.
        assert made.keeper.counts.refused == 0
        assert 6 <= made.keeper.counts.wakes <= 20


async def test_an_engine_wakes_before_its_first_request_while_another_role_works() -> None:
    async with rig("job_graph") as made:

        async def job(name: str) -> None:
            """Play a job in which a call to the planner, of 2 s, precedes one to the solver."""
            made.tell(JobAdvanced(name, "", {"planner": 1}, {"solver": 1}, SEATS))
            await made.ask("planner")
            await asyncio.sleep(2)
            made.tell(JobAdvanced(name, "planner", {"solver": 1}, {}, SEATS))
            await made.ask("solver")
            made.tell(JobAdvanced(name, "solver", {}, {}, SEATS))
            made.tell(JobEnded(name, "42", None, 3.0))

        await job("first")
        await asyncio.sleep(90)
        assert made.awake() == set()  # no job is left
        held = made.engines["solver"].stats().held
        await job("second")
        assert made.engines["solver"].stats().held == held
        assert made.keeper.counts.ahead >= 1
        await asyncio.sleep(90)
        assert made.awake() == set()
        assert made.keeper.counts.wasted == 0
        assert sum(made.sharing.ledger.held.values()) == 0


@pytest.mark.parametrize("policy", ["lru", "job_graph"])
async def test_a_job_that_was_refused_for_its_deadline_is_expected(policy: str) -> None:
    async with rig(policy) as made:
        assert made.keeper.expect_job() == pytest.approx(START_S)
        await asyncio.sleep(1.1 * START_S)
        assert len(made.awake()) == 1
        assert made.keeper.expect_job() == 0


async def test_an_engine_that_may_not_sleep_stays() -> None:
    async with rig("lru", {"planner": Rules(may_sleep=False)}) as made:
        await made.ask("planner")
        await settle()
        await made.ask("solver")
        await settle()
        await made.ask("critic")
        assert made.awake() == {"planner", "critic"}


async def test_an_engine_that_never_sleeps_wakes_without_a_call() -> None:
    async with rig("lru", {"judge": Rules(may_sleep=False)}) as made:
        await settle()
        assert made.awake() == {"judge"}


async def test_an_engine_that_fails_gives_its_place_to_others() -> None:
    async with rig() as made:

        async def fail() -> None:
            raise EngineError("no memory left")

        failing = made.engines["planner"]
        failing._wake_once = lambda grant: fail()  # type: ignore[method-assign]  # every wake fails
        with pytest.raises(EngineDead, match="does not wake"):
            await made.ask("planner")
        assert made.states()["planner"] is EngineState.FAILED
        assert await made.ask("solver") == await made.ask("critic") == WORDS
        await asyncio.sleep(5)
        assert made.awake() == {"solver", "critic"}
        assert made.sharing.ledger.held["planner"] == 0
        assert failing.usage.idle.byte_seconds < 10 * 350 * MIB


async def test_an_engine_that_waits_for_memory_gets_that_of_one_that_fails() -> None:
    async with rig() as made:
        await asyncio.gather(*(made.ask(name) for name in ("planner", "solver")))
        made.controller.use(ContainedPolicy("static", share_policies.make("static")))

        for name in ("planner", "solver"):  # they hold the whole device, and are not restarted
            made.engines[name]._patience = Patience(restarts=0, pulse_every_s=0.5)
        waiting = asyncio.create_task(made.sharing.admit("critic", 900 * MIB))
        await settle()
        assert not waiting.done()
        for name in ("planner", "solver"):
            made.engines[name].kill()
        async with asyncio.timeout(10):
            await waiting


@pytest.mark.parametrize("how", ["paused", "faulty", "fixed"])
async def test_engines_wake_although_no_policy_divides_memory(how: str) -> None:
    async with rig() as made:
        await made.ask("planner")
        await settle()  # the planner grows to the whole device
        if how == "paused":
            made.controller.pause()
        elif how == "fixed":
            made.controller.use(ContainedPolicy("fixed", share_policies.make("static", {"shares": "configured"})))
        else:
            made.controller.use(ContainedPolicy("broken", Broken(Value())))
        assert await made.ask("solver") == WORDS
        assert made.device.most <= 1000 * MIB


async def test_a_caller_that_stops_reading_does_not_block_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "DRAIN_S", 5.0)
    async with rig() as made:
        stalled = made.replicas["planner"].generate(REQUEST)
        made.keeper.look()
        assert (await anext(stalled)).text
        await made.ask("solver")
        assert await asyncio.wait_for(made.ask("critic"), 60) == WORDS
        rest = [chunk.text async for chunk in stalled]
        assert "".join(rest) == WORDS.removeprefix("one")


async def test_a_budget_that_is_too_small_for_a_moment_puts_no_engine_to_sleep() -> None:
    async with rig() as made:
        await made.ask("planner")
        await made.ask("solver")
        await settle()
        ledger = made.sharing.ledger
        for budget, awake in ((400 * MIB, 2), (1000 * MIB, 2)):
            ledger.budget_bytes = budget
            made.keeper.tick()
            assert len(made.awake()) == awake


class Broken(Policy):
    """A policy that divides nothing."""

    def decide(self, snapshot: Snapshot) -> Decision:
        raise ValueError("no idea")


class Bad(ResidencyPolicy):
    """A policy that does what a test says."""

    def __init__(self, does: object) -> None:
        super().__init__(Value())
        self.does = does

    def decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        if isinstance(self.does, Exception):
            raise self.does
        assert isinstance(self.does, ResidencyDecision)
        return self.does


@pytest.mark.parametrize(
    ("does", "fault"),
    [
        (ValueError("no idea"), "raised ValueError"),
        (ResidencyDecision(wake=("nobody",)), "there is no engine 'nobody'"),
        (ResidencyDecision(wake=NAMES), "bytes more than the budget"),
        (ResidencyDecision(sleep=("judge",)), "judge cannot go to sleep: it is cold"),
        (ResidencyDecision(wake=("judge", "judge")), "names an engine twice"),
    ],
)
async def test_a_bad_policy_is_overruled(does: object, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    async with rig(Bad(does)) as made:
        assert await made.ask("planner") == WORDS
        assert fault in caplog.text
        assert sum(fault in record.message for record in caplog.records) == 1
        assert made.keeper.counts.refused


async def test_a_policy_that_wakes_nobody_or_thrashes_is_overruled(caplog: pytest.LogCaptureFixture) -> None:
    policy = Bad(ResidencyDecision())
    async with rig(policy) as made:
        began_s = asyncio.get_running_loop().time()
        assert await made.ask("planner") == WORDS
        assert STARVED_S < asyncio.get_running_loop().time() - began_s < STARVED_S + 2
        policy.does = ResidencyDecision(sleep=("planner",))
        await asyncio.sleep(0.3)
        assert made.awake() == {"planner"}
        assert "planner woke" in caplog.text
        await asyncio.sleep(2)
        assert made.awake() == set()


@pytest.mark.parametrize("naps", [False, True])
async def test_random_sleeps_wakes_and_deaths_lose_nothing(naps: bool) -> None:
    rng = random.Random(17)
    async with rig("lru", naps=naps) as made:

        async def client(name: str) -> None:
            for _ in range(25):
                await asyncio.sleep(rng.expovariate(1))
                assert await made.ask(name) == WORDS

        async def killer() -> None:
            while True:
                await asyncio.sleep(rng.expovariate(1))
                made.engines[rng.choice(NAMES)].kill()

        killing = asyncio.create_task(killer())
        await asyncio.gather(*(client(name) for name in NAMES for _ in range(3)))
        killing.cancel()
        assert made.device.most <= 1000 * MIB
        assert made.keeper.counts.sleeps > 20
        await settle()
        assert {name: made.sharing.ledger.held[name] for name in NAMES} == made.device.held
        assert EngineState.FAILED not in made.states().values()
