"""The control loop over fake engines on a virtual clock: memory follows the work, and no fault stops the loop."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from agents.role import Message, Value
from runtime.control import catalogue, pauses
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import BURST, Controller
from runtime.control.decision_log import Record
from runtime.control.forecast import Forecast
from runtime.control.policy import Decision, Policy
from runtime.control.snapshot import Snapshot
from runtime.control.snapshotter import EngineRequirements, Snapshotter
from runtime.engines import replicas
from runtime.engines.fake import FakeEngine, FakeMemory, Processor, ServiceTime
from runtime.engines.grant import Grant, ResizeOutcome
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.request import GenerateRequest
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import Patience, SupervisedEngine
from runtime.errors import InputError, NotFound
from runtime.events import JobAdvanced
from runtime.telemetry.reading import DeviceReading, Reading

pytestmark = pytest.mark.virtual_time

MIB = 1 << 20
DEVICE = 1000 * MIB
MEMORY = FakeMemory(device=DEVICE, fixed=100 * MIB, floor=10 * MIB, token=MIB // 100, block_tokens=100)
"""A sequence of up to 100 tokens, prompt included, takes 1 MiB."""
WORDS = " ".join(["word"] * 20)
TIMES = ServiceTime(step_s=0.01, token_s=0, prefill_s=0)


class Rig:
    """A controller over engines that share 80% of the device equally, and the records that it published."""

    def __init__(self, names: str, times: ServiceTime, processor: Processor | None = None) -> None:
        processor = processor or Processor(lanes=1)
        self.engines = {name: StallingEngine(name, 0.8 / len(names), times, processor) for name in names}
        self.handles: dict[str, EngineHandle] = {**self.engines}
        self.replicas = replicas.gathered(self.handles)
        self.ledger = Ledger(800 * MIB)
        self.sharing = Sharing(self.handles, self.ledger)
        self.records: list[Record] = []
        self.forecast = Forecast()
        self.reading = Reading("gpu", (DeviceReading("GPU", 0, 0),))
        self.telemetry: Callable[[], Reading] = lambda: self.reading
        self.controller: Controller

    def read(self) -> Reading:
        return self.telemetry()

    def share(self, name: str) -> float:
        return round(self.engines[name].grant.gpu_memory_utilization, 3)

    async def ask(self, name: str, count: int, prompt_tokens: int = 1) -> None:
        """Send `count` requests to an engine at once, and wait for all replies."""
        prompt = " ".join(["hello"] * prompt_tokens)

        async def send(number: int) -> None:
            request = GenerateRequest(f"{name}{number}", (Message("user", prompt),), 0.0, 1.0, 50)
            async for _ in self.replicas[name].generate(request):
                pass

        await asyncio.gather(*(send(number) for number in range(count)))

    async def keep_busy(self, name: str) -> None:
        """Send an engine more requests than it can run at once, until cancelled."""
        while True:
            await self.ask(name, 1000)


class StallingEngine(FakeEngine):
    """A fake engine whose resizes hang while `may_resize` is not set."""

    def __init__(self, name: str, share: float, times: ServiceTime = TIMES, processor: Processor | None = None) -> None:
        grant = Grant(share, 500, 2048)
        super().__init__(name, lambda request: WORDS, 500, times, 1, MEMORY, grant, processor)
        self.may_resize = asyncio.Event()
        self.may_resize.set()

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        await self.may_resize.wait()
        return await super().resize(grant, grace_s)


class Broken(Policy):
    """A policy that raises."""

    def decide(self, snapshot: Snapshot) -> Decision:
        raise RuntimeError("broken")


def made(policy: str | Policy) -> Policy:
    return catalogue.make(policy) if isinstance(policy, str) else policy


@asynccontextmanager
async def start_rig(
    policy: str | Policy = "waterfill",
    shadow: str | Policy | None = None,
    names: str = "ab",
    times: ServiceTime = TIMES,
    processor: Processor | None = None,
    **options: Any,
) -> AsyncIterator[Rig]:
    """Run a controller over started engines, one per letter of `names`; engine b is less urgent."""
    rig = Rig(names, times, processor)
    for engine in rig.engines.values():
        await engine.start()
        rig.ledger.claim(engine.name, engine.limits.held_bytes(engine.grant.gpu_memory_utilization))
    rig.controller = Controller(
        rig.handles,
        rig.sharing,
        Snapshotter(rig.handles, rig.forecast, {"b": EngineRequirements(priority=2)}, rig.read),
        ContainedPolicy("chosen", made(policy)),
        shadow=ContainedPolicy(shadow if isinstance(shadow, str) else "own", made(shadow)) if shadow else None,
        publish=rig.records.append,
        **options,
    )
    async with rig.controller:
        yield rig
    await rig.sharing.close()


async def test_memory_moves_to_the_busy_engine_and_back() -> None:
    async with start_rig() as rig:
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert rig.share("a") > 0.65
        assert rig.share("b") < 0.15
        work.cancel()
        await asyncio.sleep(0.5)
        assert rig.share("a") == pytest.approx(0.4, abs=0.02)  # damping skips small changes
        assert rig.share("b") == pytest.approx(0.4, abs=0.02)
        assert rig.controller.counts.faults == 0
        assert all(record.snapshot.budget_bytes == 800 * MIB for record in rig.records)


async def test_decides_every_tick_and_at_once_on_a_burst() -> None:
    async with start_rig(every_s=10) as rig:
        await asyncio.sleep(25)
        assert [record.cause for record in rig.records] == ["start", "tick", "tick"]
        work = asyncio.create_task(rig.ask("a", 400))
        await asyncio.sleep(0.001)
        rig.controller.on_event(JobAdvanced("j", "", {"a": 1}, None))
        await asyncio.sleep(0.02)
        assert rig.records[-1].cause == BURST
        assert rig.share("a") > 0.4
        await work
        await asyncio.sleep(0.1)
        assert len(rig.controller.counts.reactions_s) == 1


async def test_burst_during_a_decision_causes_the_next_decision() -> None:
    async with start_rig(every_s=10) as rig:
        await asyncio.sleep(1)
        rig.engines["b"].may_resize.clear()
        first = asyncio.create_task(rig.ask("a", 400))
        await asyncio.sleep(0.001)
        rig.controller.on_event(JobAdvanced("j", "", {"a": 1}, None))
        await asyncio.sleep(0.1)  # the first decision waits for its donor
        second = asyncio.create_task(rig.ask("b", 700))
        await asyncio.sleep(0.001)
        rig.controller.on_event(JobAdvanced("k", "", {"b": 1}, None))
        rig.engines["b"].may_resize.set()
        await asyncio.sleep(0.1)
        assert [record.cause for record in rig.records] == ["start", BURST, BURST]
        await asyncio.gather(first, second)


async def test_calls_to_an_engine_that_just_shrank_are_a_burst() -> None:
    async with start_rig(every_s=10) as rig:
        await asyncio.sleep(1)
        first = asyncio.create_task(rig.ask("a", 700))
        await asyncio.sleep(0.001)
        rig.controller.on_event(JobAdvanced("j", "", {"a": 1}, None))
        await asyncio.sleep(0.05)
        assert rig.share("b") < 0.15
        second = asyncio.create_task(rig.ask("b", 200))  # these would have fitted before it shrank
        await asyncio.sleep(0.001)
        rig.controller.on_event(JobAdvanced("k", "", {"b": 1}, None))
        await asyncio.sleep(0.05)
        assert [record.cause for record in rig.records] == ["start", BURST, BURST]
        assert rig.share("b") > 0.15
        await asyncio.gather(first, second)


async def test_ticks_twice_as_often_while_memory_is_short() -> None:
    async with start_rig(every_s=0.1) as rig:
        await asyncio.sleep(1.05)
        calm = len(rig.records)
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(0.5)
        before = len(rig.records)
        await asyncio.sleep(1)
        assert (calm, len(rig.records) - before) == (11, 20)
        work.cancel()


async def test_policy_is_not_asked_if_all_engines_are_pinned() -> None:
    async with start_rig("round_robin") as rig:
        rig.controller.pin("a", Grant(0.5, 500, 2048))
        rig.controller.pin("b", Grant(0.2, 500, 2048))
        await asyncio.sleep(1)
        assert (rig.share("a"), rig.share("b")) == (0.5, 0.2)
        assert rig.controller.counts.faults == 0


async def test_memory_taken_by_another_process_shrinks_the_budget() -> None:
    async with start_rig() as rig:
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 900 * MIB),))
        await asyncio.sleep(0.3)  # 100 MiB free: the engines could hold more, but not more than the budget
        assert rig.share("a") == 0.4
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB),))
        await asyncio.sleep(0.15)  # nothing free: the engines give up the headroom of 20 MiB at every tick
        assert rig.share("a") + rig.share("b") < 0.8
        assert rig.records[-1].snapshot.device.foreign_bytes > 0
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 200 * MIB),))
        await asyncio.sleep(1)
        assert rig.share("a") == rig.share("b") == 0.4


async def test_host_reading_counts_for_a_gpu_without_its_own_memory() -> None:
    async with start_rig() as rig:
        for engine in rig.engines.values():
            engine._limits = replace(engine.limits, device_uuids=("11111111-1111-1111-1111-111111111111",))
        rig.reading = Reading("host", (DeviceReading("host", 1000 * MIB, 1000 * MIB),))
        await asyncio.sleep(0.15)
        device = rig.records[-1].snapshot.device
        assert (device.fault, device.used_bytes) == (None, 1000 * MIB)
        assert rig.share("a") + rig.share("b") < 0.8


async def test_budget_stays_cut_while_telemetry_has_a_fault() -> None:
    """Memory that another process had taken may still be taken."""
    async with start_rig() as rig:
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB),))
        await asyncio.sleep(0.5)
        cut = rig.records[-1].snapshot.budget_bytes
        assert cut < 800 * MIB
        for silent in (
            Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB, fault="GPU is lost"),)),
            Reading("gpu", (), "driver not loaded"),
        ):
            rig.reading = silent
            await asyncio.sleep(0.5)
            assert rig.records[-1].snapshot.budget_bytes == cut
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 100 * MIB),))
        await asyncio.sleep(0.5)
        assert rig.records[-1].snapshot.budget_bytes == 800 * MIB


async def test_lost_gpu_keeps_the_budget_and_is_recorded() -> None:
    async with start_rig() as rig:
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB, fault="GPU is lost"),))
        await asyncio.sleep(0.5)
        assert rig.records[-1].snapshot.device.fault == "GPU is lost"
        assert rig.share("a") == 0.4
        rig.reading = Reading("gpu", (), "driver not loaded")
        await asyncio.sleep(0.5)
        assert rig.records[-1].snapshot.device.fault == "driver not loaded"


async def test_policy_that_raises_keeps_the_last_grants_and_is_named() -> None:
    async with start_rig(Broken(Value())) as rig:
        await asyncio.sleep(1)
        assert rig.share("a") == 0.4
        assert rig.records[-1].fault == "policy chosen raised RuntimeError('broken')"
        assert rig.controller.counts.faults == rig.controller.counts.decisions > 5
        rig.controller.pin("b", Grant(0.3, 500, 2048))
        await asyncio.sleep(0.5)
        assert rig.share("b") == 0.3
        rig.controller.unpin("b")
        rig.controller.use(ContainedPolicy("waterfill", catalogue.make("waterfill")))
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert rig.share("a") > 0.6
        work.cancel()


async def test_memory_moves_between_the_others_while_an_engine_hangs_in_a_resize() -> None:
    async with start_rig(names="abc") as rig:
        rig.engines["b"].may_resize.clear()
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(3)
        assert set(rig.records[-1].snapshot.engines) == {"a", "c"}
        assert rig.share("a") > 0.4  # from c, because b has not released its part
        assert sum(rig.ledger.held.values()) <= 800 * MIB
        before = len(rig.records)
        await asyncio.sleep(3)
        assert len(rig.records) > before + 20
        rig.engines["b"].may_resize.set()
        await asyncio.sleep(1)
        assert set(rig.records[-1].snapshot.engines) == {"a", "b", "c"}
        assert rig.share("a") > 0.5
        assert rig.controller.counts.faults == 0
        work.cancel()


async def test_memory_of_a_dead_engine_is_reserved() -> None:
    async with start_rig() as rig:
        rig.engines["b"].kill()
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert set(rig.records[-1].snapshot.engines) == {"a"}
        assert rig.records[-1].snapshot.budget_bytes == 400 * MIB
        assert rig.share("a") == 0.4
        work.cancel()


async def test_pause_pin_and_policy_change_take_effect_while_running() -> None:
    async with start_rig() as rig:
        rig.controller.pin("b", rig.controller.current_grant("b"))
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert (rig.share("a"), rig.share("b")) == (0.4, 0.4)
        rig.controller.pin("b", Grant(0.3, 500, 2048))
        await asyncio.sleep(0.5)
        assert (rig.share("a"), rig.share("b")) == (0.5, 0.3)
        rig.controller.pause()
        await asyncio.sleep(0.2)
        rig.controller.unpin("b")
        before = len(rig.records)
        await asyncio.sleep(1)
        assert len(rig.records) == before
        assert (rig.share("a"), rig.share("b")) == (0.5, 0.3)
        rig.controller.resume()
        await asyncio.sleep(0.5)
        assert rig.share("b") < 0.15
        rig.controller.use(ContainedPolicy("static", catalogue.make("static")))
        await asyncio.sleep(1)
        assert (rig.share("a"), rig.share("b")) == (0.4, 0.4)
        assert rig.controller.policy == rig.records[-1].policy == "static"
        work.cancel()


async def test_invalid_pin_is_refused_with_its_reason() -> None:
    async with start_rig() as rig:
        with pytest.raises(NotFound, match="there is no engine 'c'; the engines are a, b"):
            rig.controller.pin("c", Grant(0.3, 500, 2048))
        with pytest.raises(NotFound, match="there is no engine 'c'"):
            rig.controller.unpin("c")
        with pytest.raises(InputError, match=r"engine a: gpu_memory_utilization 0\.01 is below"):
            rig.controller.pin("a", Grant(0.01, 1, 2048))
        assert not rig.controller.pinned


async def test_pin_that_leaves_others_below_their_floors_is_refused_with_what_fits() -> None:
    async with start_rig(names="abc") as rig:
        with pytest.raises(InputError) as refused:  # the others keep floors of 110 MiB: 580 of 800 MiB are left
            rig.controller.pin("a", Grant(0.6, 500, 2048))
        assert str(refused.value) == (
            "engine a: gpu_memory_utilization 0.6 would leave the other engines less than their floors and pins;"
            " at most 0.58 fits"
        )
        assert not rig.controller.pinned
        rig.controller.pin("a", Grant(0.58, 500, 2048))
        await asyncio.sleep(0.5)
        assert [rig.share(name) for name in "abc"] == [0.58, 0.11, 0.11]


async def test_pin_must_fit_together_with_the_other_pins() -> None:
    async with start_rig(names="abc") as rig:
        rig.controller.pin("a", Grant(0.4, 500, 2048))
        with pytest.raises(InputError, match=r"engine b: .* at most 0\.29 fits"):
            rig.controller.pin("b", Grant(0.3, 500, 2048))
        rig.controller.pin("b", Grant(0.29, 500, 2048))
        rig.controller.pin("a", Grant(0.2, 500, 2048))  # replaces the first pin
        await asyncio.sleep(0.5)
        assert [rig.share(name) for name in "abc"] == [0.2, 0.29, 0.31]
        assert rig.controller.counts.rejected == 0


async def test_pin_that_no_longer_fits_a_cut_budget_is_reported_and_suspended() -> None:
    async with start_rig(names="abc") as rig:
        rig.controller.pin("a", Grant(0.3, 500, 2048))
        rig.controller.pin("b", Grant(0.35, 500, 2048))
        await asyncio.sleep(0.5)
        work = asyncio.create_task(rig.keep_busy("c"))
        # 600 MiB are 270 above the floors: enough for a's pin, which needs 190, but not also for b's, which needs 240.
        rig.controller.use(rig.controller._policy, 600 * MIB)
        await asyncio.sleep(1)
        assert rig.share("a") == 0.3
        assert rig.share("c") > 0.15  # the policy decides about b and c
        assert sum(rig.ledger.held.values()) <= 600 * MIB
        assert [*rig.controller.pinned] == ["a", "b"]
        assert [*rig.controller.unfit_pins] == ["b"]
        assert "at most 0.19 fits" in rig.controller.unfit_pins["b"]
        assert rig.records[-1].unfit_pins == rig.controller.unfit_pins
        before = rig.controller.counts.rejected
        rig.controller.use(rig.controller._policy, 800 * MIB)
        await asyncio.sleep(1)
        assert (rig.share("a"), rig.share("b")) == (0.3, 0.35)
        assert rig.controller.unfit_pins == {}
        assert rig.controller.counts.rejected == before == 0
        work.cancel()


async def test_pin_is_suspended_while_another_process_takes_its_memory() -> None:
    async with start_rig() as rig:
        rig.controller.pin("a", Grant(0.6, 500, 2048))
        await asyncio.sleep(0.5)
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1080 * MIB),))
        await asyncio.sleep(0.15)
        assert [*rig.controller.unfit_pins] == ["a"]
        assert sum(rig.ledger.held.values()) <= rig.records[-1].snapshot.budget_bytes < 800 * MIB
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 200 * MIB),))
        await asyncio.sleep(0.5)
        assert (rig.share("a"), rig.controller.unfit_pins) == (0.6, {})
        rig.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1080 * MIB),))
        await asyncio.sleep(0.15)
        rig.controller.pause()
        rig.controller.unpin("a")
        assert rig.controller.unfit_pins == {}


async def test_pin_below_the_floor_of_an_engine_that_restarted_larger_is_suspended() -> None:
    async with start_rig(names="abc") as rig:
        rig.controller.pin("a", Grant(0.15, 500, 2048))
        await asyncio.sleep(0.5)
        rig.engines["a"]._limits = replace(rig.engines["a"].limits, fixed_bytes=160 * MIB)
        rig.engines["a"].grant = Grant(0.17, 500, 2048)
        work = asyncio.create_task(rig.keep_busy("b"))
        await asyncio.sleep(1)
        assert rig.controller.unfit_pins == {"a": "gpu_memory_utilization 0.15 is below the engine's floor of 0.1700"}
        assert rig.share("b") > 0.4
        assert rig.controller.counts.rejected == 0
        work.cancel()


async def test_an_engine_that_takes_no_grants_has_no_current_one() -> None:
    async with start_rig() as rig:
        rig.engines["a"].kill()
        with pytest.raises(InputError, match="engine a is dead and takes no grant now; pin it once it is ready"):
            rig.controller.current_grant("a")


async def test_shadow_decides_without_resizing() -> None:
    async with start_rig("static", shadow="round_robin") as rig:
        await asyncio.sleep(3)
        assert (rig.share("a"), rig.share("b")) == (0.4, 0.4)
        assert rig.records[-1].shadow_policy == "round_robin"
        shadow = rig.records[-1].shadow
        assert shadow is not None
        assert {round(grant.gpu_memory_utilization, 2) for grant in shadow.grants.values()} == {0.11, 0.69}


class Watching(Policy):
    """A policy that changes nothing, and notes the share of engine a when it is asked."""

    def __init__(self) -> None:
        super().__init__(Value())
        self.rig: Rig | None = None
        self.seen: list[float] = []

    def decide(self, snapshot: Snapshot) -> Decision:
        if self.rig is not None:
            self.seen.append(self.rig.share("a"))
        return Decision()


async def test_a_shadow_does_not_hold_up_the_decision_in_force() -> None:
    watching = Watching()
    async with start_rig("static", shadow=watching, every_s=10) as rig:
        await asyncio.sleep(1)
        watching.rig = rig
        rig.controller.use(ContainedPolicy("weighted", catalogue.make("static", {"shares": {"a": 3}})))
        await asyncio.sleep(1)
        assert watching.seen == [rig.share("a")]
        assert rig.share("a") > 0.5


async def test_calls_while_the_controller_is_paused_are_a_burst_once() -> None:
    async with start_rig(every_s=10) as rig:
        rig.controller.pause()
        work = asyncio.create_task(rig.ask("a", 1000))
        await asyncio.sleep(0.001)
        rig.controller.look()
        await asyncio.sleep(0.1)
        rig.controller.look()
        assert not rig.controller._wake.is_set()
        await work


async def test_loop_survives_telemetry_that_raises() -> None:
    async with start_rig() as rig:
        good, rig.reading = rig.reading, None  # type: ignore[assignment]
        await asyncio.sleep(0.5)
        assert rig.controller.counts.faults > 2
        rig.reading = good
        before = len(rig.records)
        await asyncio.sleep(0.5)
        assert len(rig.records) > before


async def test_memory_moves_between_the_others_while_an_engine_restarts() -> None:
    async with start_rig(names="abc") as rig:
        may_start = asyncio.Event()
        may_start.set()

        class Restarting(StallingEngine):
            async def start(self) -> None:
                await may_start.wait()
                await super().start()

        supervised = SupervisedEngine("a", lambda grant: Restarting("a", 0.8 / 3), patience=Patience(backoff_s=(0,)))
        rig.handles["a"] = supervised
        await supervised.start()
        may_start.clear()
        supervised.kill()
        work = asyncio.create_task(rig.keep_busy("b"))
        await asyncio.sleep(5)
        assert supervised.stats().state is EngineState.STARTING
        assert rig.controller.counts.faults == 0
        assert rig.share("b") > 0.4  # it started with 0.27
        assert rig.ledger.held["a"] == int(0.8 / 3 * DEVICE)
        may_start.set()
        await asyncio.sleep(5)
        assert supervised.stats().state is EngineState.READY
        assert rig.controller.counts.faults == 0
        work.cancel()
        await supervised.close()


async def test_failing_tick_is_retried_at_the_next_interval_and_logged_once() -> None:
    async with start_rig(every_s=0.1) as rig:
        await asyncio.sleep(0.5)
        with pytest.MonkeyPatch.context() as patch:
            failures = 0

            def fail(*arguments: object) -> Snapshot:
                nonlocal failures
                failures += 1
                raise RuntimeError("no snapshot")

            patch.setattr(rig.controller, "_take_snapshot", fail)
            with logged("runtime.control.controller") as messages:
                for _ in range(500):
                    rig.controller.wake(BURST)
                    await asyncio.sleep(0.01)
        assert 0 < failures <= 5 / 0.1
        assert messages == ["a tick of the controller failed"]
        before = rig.controller.counts.decisions
        await asyncio.sleep(0.5)
        assert rig.controller.counts.decisions > before


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """Yield the list of messages that a logger receives."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(name).removeHandler(handler)


class Stopping(Policy):
    """A policy that pauses the admission of engine b, and keeps all memory where it is."""

    def decide(self, snapshot: Snapshot) -> Decision:
        grants = {
            name: replace(view.grant, max_active_seqs=0 if name == "b" else 500)
            for name, view in snapshot.engines.items()
        }
        return Decision(grants, dict.fromkeys(grants, "stopping"))


async def test_a_paused_engine_keeps_its_requests_and_admits_them_after_the_longest_pause() -> None:
    async with start_rig(Stopping(Value())) as rig:
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(0.5)
        asked = asyncio.create_task(rig.ask("b", 5))
        await asyncio.sleep(pauses.MOST_S - 1)
        assert not asked.done()
        assert rig.engines["b"].stats().waiting == 5
        assert rig.records[-1].snapshot.engines["b"].paused_s == pytest.approx(pauses.MOST_S - 0.5, abs=0.3)
        await asyncio.wait_for(asked, 2)
        work.cancel()


async def test_a_paused_engine_is_admitted_when_its_policy_fails_or_the_controller_pauses() -> None:
    async with start_rig(Stopping(Value())) as rig:
        await asyncio.sleep(0.5)
        rig.controller.use(ContainedPolicy("broken", Broken(Value())))
        asked = asyncio.create_task(rig.ask("b", 5))
        await asyncio.wait_for(asked, pauses.MOST_S + 2)
        rig.controller.use(ContainedPolicy("stopping", Stopping(Value())))
        await asyncio.sleep(0.5)
        rig.controller.pause()
        await asyncio.wait_for(rig.ask("b", 5), 1)
        await asyncio.sleep(1)
        assert rig.controller.snapshot is not None  # it stays current, although the last record shows a pause
        assert rig.controller.snapshot.engines["b"].paused_s == 0 < rig.records[-1].snapshot.engines["b"].paused_s


class Malformed(Policy):
    """A policy whose grants lack a number."""

    def decide(self, snapshot: Snapshot) -> Decision:
        return Decision({name: replace(view.grant, max_active_seqs=None) for name, view in snapshot.engines.items()})  # type: ignore[arg-type]


async def test_a_paused_engine_is_admitted_when_its_policy_decides_nonsense() -> None:
    async with start_rig(Stopping(Value())) as rig:
        await asyncio.sleep(0.5)
        rig.controller.use(ContainedPolicy("malformed", Malformed(Value())))
        await asyncio.wait_for(rig.ask("b", 5), pauses.MOST_S + 2)


class Reconsidering(Policy):
    """A policy that gives c the memory of a and b, and then lets c keep what it has got so far and admits all."""

    def __init__(self) -> None:
        super().__init__(Value())
        self.decided = 0

    def decide(self, snapshot: Snapshot) -> Decision:
        if snapshot.engines["a"].running < 100:
            return Decision({})
        self.decided += 1
        if self.decided == 1:
            grants = {"a": Grant(0.15, 0, 2048), "b": Grant(0.15, 0, 2048), "c": Grant(0.5, 500, 2048)}
        else:
            kept = snapshot.engines["c"].grant
            grants = {"a": Grant(0.15, 500, 2048), "b": Grant(0.65 - kept.gpu_memory_utilization, 500, 2048), "c": kept}
        return Decision(grants, dict.fromkeys(grants, "reconsidered"))


async def test_an_engine_may_keep_what_it_has_while_it_waits_for_more() -> None:
    policy = Reconsidering()
    async with start_rig(policy, names="abc", times=replace(TIMES, step_s=0.4), grace_s=60) as rig:
        work = [asyncio.create_task(rig.ask(name, count)) for name, count in (("a", 400), ("c", 1))]
        while policy.decided < 3:  # noqa: ASYNC110  the policy decides when requests run
            await asyncio.sleep(0.1)
        first = rig.records[[record.cause for record in rig.records].index("tick")]
        assert first.fault is None
        assert {outcome.state for record in rig.records for outcome in record.outcomes.values()} >= {"deferred"}
        assert rig.controller.counts.rejected == 0
        assert rig.engines["a"].grant.max_active_seqs == 500
        await asyncio.gather(*work)


class Preempting(Policy):
    """A policy that preempts an engine at every tick: always `victim`, or each of both in turn if it is None."""

    def __init__(self, victim: str | None = None) -> None:
        super().__init__(Value())
        self._victim = victim
        self._ticks = 0

    def decide(self, snapshot: Snapshot) -> Decision:
        self._ticks += 1
        victim = self._victim or "ab"[self._ticks % 2]
        grants = {
            name: replace(view.grant, max_active_seqs=0 if name == victim else 500, preempt=name == victim)
            for name, view in snapshot.engines.items()
        }
        return Decision(grants, dict.fromkeys(grants, "preempting"))


SLOW = ServiceTime(step_s=0.3, token_s=0, prefill_s=0)
"""A step takes three ticks."""
LONG = 4000
"""Length of a prompt, in tokens, that takes two steps."""


async def test_requests_end_although_a_policy_preempts_their_engine_at_every_tick() -> None:
    async with start_rig(Preempting("b"), times=SLOW) as rig:
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.wait_for(rig.ask("b", 2, LONG), 4 * pauses.MOST_S)
        work.cancel()
        reasons = [record.decision.reasons["b"] for record in rig.records if record.decision]
        assert {reason.split(" for ")[0] for reason in reasons} == {
            "preempting",
            "was paused",
            "no reply was completed",
        }
        shown = next(r.decision for r in rig.records if r.decision and r.decision.reasons["b"].startswith("was paused"))
        assert shown.grants["b"].max_active_seqs == 500  # the record has what was applied


async def test_requests_end_although_a_policy_preempts_another_engine_at_every_tick() -> None:
    async with start_rig(Preempting(), times=SLOW) as rig:
        await asyncio.wait_for(asyncio.gather(rig.ask("a", 2, LONG), rig.ask("b", 2, LONG)), 4 * pauses.MOST_S)


async def test_policy_that_pauses_every_engine_with_requests_is_refused() -> None:
    async with start_rig(Stopping(Value())) as rig:
        await asyncio.wait_for(rig.ask("b", 5), pauses.MOST_S + 2)
        faults = [record.fault for record in rig.records if record.fault]
        assert faults
        assert "at least one must have max_active_seqs above 0" in faults[0]


async def test_a_pin_cannot_pause_an_engine() -> None:
    async with start_rig() as rig:
        with pytest.raises(InputError, match="max_active_seqs 0 would pause the engine for as long as it is pinned"):
            rig.controller.pin("a", replace(rig.engines["a"].grant, max_active_seqs=0))


async def test_snapshots_carry_the_costs_of_the_engines_steps() -> None:
    async with start_rig() as rig:
        work = asyncio.create_task(rig.keep_busy("a"))
        await asyncio.sleep(2)
        work.cancel()
        cost = rig.records[-1].snapshot.engines["a"].cost
        assert cost.confidence > 0.8
        assert cost.seconds(50) == pytest.approx(TIMES.step_s, rel=0.2)
        assert rig.records[-1].snapshot.engines["b"].cost.confidence == 0


async def mean_admitted(read: Callable[["Rig"], Reading], processor: Processor | None = None) -> float:
    """Return how many of two engines were admitted on average, if both had more work than fits.

    `read` is the telemetry of their GPU. Under `turns`, a GPU that they leave half idle has room for both at once.
    """
    costs = ServiceTime(step_s=0.05, token_s=0.00001, prefill_s=0)
    async with start_rig("turns", times=costs, processor=processor) as rig:
        rig.telemetry = lambda: read(rig)
        work = [asyncio.create_task(rig.keep_busy(name)) for name in "ab"]
        await asyncio.sleep(20)
        for task in work:
            task.cancel()
        late = [record.snapshot.views for record in rig.records if record.snapshot.now_s > 10]
        return sum(view.grant.max_active_seqs > 0 for views in late for view in views) / len(late)


async def test_utilization_that_nvml_reports_decides_whom_turns_admits() -> None:
    async def admitted(utilization: float) -> float:
        return await mean_admitted(lambda rig: Reading("gpu", (DeviceReading("GPU", 0, 0, utilization=utilization),)))

    assert await admitted(0.45) > await admitted(1.0) + 0.3


class MeasuredProcessor(Processor):
    """A processor that knows its utilization: an engine alone keeps it busy for 1 / lanes of its steps."""

    def __init__(self, lanes: float) -> None:
        super().__init__(lanes)
        self._busy_s = self._seen_s = self._read_s = self._latest = 0.0

    async def spend(self, seconds: float) -> None:
        self._count()
        try:
            await super().spend(seconds)
        finally:
            self._count()

    def _count(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._busy_s += min(self._busy / self._lanes, 1.0) * (now_s - self._seen_s)
        self._seen_s = now_s

    def utilization(self) -> float:
        """Return the utilization over the last second or so, as NVML does."""
        self._count()
        if self._seen_s - self._read_s >= 1:
            self._latest = self._busy_s / (self._seen_s - self._read_s)
            self._busy_s, self._read_s = 0.0, self._seen_s
        return self._latest


@pytest.mark.parametrize(("lanes", "at_least", "at_most"), [(1.0, 1.0, 1.5), (2.2, 1.7, 2.0)])
async def test_turns_follows_the_utilization_of_a_simulated_device(
    lanes: float, at_least: float, at_most: float
) -> None:
    processor = MeasuredProcessor(lanes)

    def read(rig: Rig) -> Reading:
        return Reading("gpu", (DeviceReading("GPU", 0, 0, utilization=processor.utilization()),))

    assert at_least <= await mean_admitted(read, processor) <= at_most
