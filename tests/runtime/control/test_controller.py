"""The loop over fake engines, on a clock that jumps: it moves memory to where the work is, and nothing stops it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from agents.role import Message, Value
from runtime.control import catalogue
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import BURST, Controller
from runtime.control.decision_log import Record
from runtime.control.forecast import Forecast
from runtime.control.policy import Decision, Policy
from runtime.control.snapshot import Snapshot
from runtime.control.snapshotter import Snapshotter, Terms
from runtime.engines.fake import FakeEngine, FakeMemory, ServiceTime
from runtime.engines.grant import Grant, ResizeOutcome
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.request import GenerateRequest
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import Patience, SupervisedEngine
from runtime.errors import InputError, TroupeError
from runtime.events import JobAdvanced
from runtime.simulation import virtual_time
from runtime.telemetry.reading import DeviceReading, Reading

MIB = 1 << 20
DEVICE = 1000 * MIB
MEMORY = FakeMemory(device=DEVICE, fixed=100 * MIB, floor=10 * MIB, token=MIB // 100, block_tokens=100)
"""A request of a prompt and up to 99 tokens takes 1 MiB."""
WORDS = " ".join(["word"] * 20)
TIMES = ServiceTime(step_s=0.01, token_s=0, prefill_s=0)


class Rig:
    """Engines that share 0.8 of the device equally, their controller, and what it published."""

    def __init__(self, names: str) -> None:
        self.engines = {name: Slow(name, 0.8 / len(names)) for name in names}
        self.handles: dict[str, EngineHandle] = {**self.engines}
        self.ledger = Ledger(800 * MIB)
        self.sharing = Sharing(self.handles, self.ledger)
        self.records: list[Record] = []
        self.forecast = Forecast()
        self.reading = Reading("gpu", (DeviceReading("GPU", 0, 0),))
        self.controller: Controller

    def share(self, name: str) -> float:
        return round(self.engines[name].grant.gpu_memory_utilization, 3)

    async def ask(self, name: str, count: int) -> None:
        """So many requests to an engine at once, until all are answered."""

        async def one(number: int) -> None:
            request = GenerateRequest(f"{name}{number}", (Message("user", "hello"),), 0.0, 1.0, 50)
            async for _ in self.engines[name].generate(request):
                pass

        await asyncio.gather(*(one(number) for number in range(count)))

    async def keep_busy(self, name: str) -> None:
        """More than it can run at once, for ever."""
        while True:
            await self.ask(name, 1000)


class Slow(FakeEngine):
    """A fake engine whose resizes can be made to hang or be killed."""

    def __init__(self, name: str, share: float) -> None:
        grant = Grant(share, 500, 2048)
        super().__init__(name, lambda request: WORDS, 500, TIMES, time_scale=1, memory=MEMORY, grant=grant)
        self.hang = asyncio.Event()
        self.hang.set()

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        await self.hang.wait()
        return await super().resize(grant, grace_s)


class Broken(Policy):
    """Raises."""

    def decide(self, snapshot: Snapshot) -> Decision:
        raise RuntimeError("broken")


@asynccontextmanager
async def rig(
    policy: str | Policy = "waterfill", shadow: str | None = None, names: str = "ab", **options: Any
) -> AsyncIterator[Rig]:
    rig = Rig(names)
    for engine in rig.engines.values():
        await engine.start()
        rig.ledger.claim(engine.name, engine.limits.held_bytes(engine.grant.gpu_memory_utilization))
    chosen = catalogue.make(policy) if isinstance(policy, str) else policy
    rig.controller = Controller(
        rig.handles,
        rig.sharing,
        Snapshotter(rig.handles, rig.forecast, {"b": Terms(priority=2)}, lambda: rig.reading),
        ContainedPolicy("chosen", chosen),
        shadow=ContainedPolicy(shadow, catalogue.make(shadow)) if shadow else None,
        publish=rig.records.append,
        **options,
    )
    async with rig.controller:
        yield rig
    await rig.sharing.close()


def simulated(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        virtual_time.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@simulated
async def test_memory_goes_where_the_work_is_and_comes_back() -> None:
    async with rig() as at:
        work = asyncio.create_task(at.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert at.share("a") > 0.65
        assert at.share("b") < 0.15
        work.cancel()
        await asyncio.sleep(0.5)
        assert at.share("a") == pytest.approx(0.4, abs=0.02)  # small changes are not made
        assert at.share("b") == pytest.approx(0.4, abs=0.02)
        assert at.controller.counts.faults == 0
        assert all(record.snapshot.budget_bytes == 800 * MIB for record in at.records)


@simulated
async def test_it_decides_every_tick_and_at_once_on_a_burst() -> None:
    async with rig(every_s=10) as at:
        await asyncio.sleep(25)
        assert [record.cause for record in at.records] == ["start", "tick", "tick"]
        work = asyncio.create_task(at.ask("a", 400))
        await asyncio.sleep(0.001)
        at.controller.hear(JobAdvanced("j", "", {"a": 1}, None))
        await asyncio.sleep(0.02)
        assert at.records[-1].cause == BURST
        assert at.share("a") > 0.4
        await work
        await asyncio.sleep(0.1)
        assert len(at.controller.counts.reactions_s) == 1


@simulated
async def test_a_burst_that_comes_while_it_decides_is_decided_about_next() -> None:
    async with rig(every_s=10) as at:
        await asyncio.sleep(1)
        at.engines["b"].hang.clear()
        first = asyncio.create_task(at.ask("a", 400))
        await asyncio.sleep(0.001)
        at.controller.hear(JobAdvanced("j", "", {"a": 1}, None))
        await asyncio.sleep(0.1)  # deciding: the donor hangs
        second = asyncio.create_task(at.ask("b", 700))
        await asyncio.sleep(0.001)
        at.controller.hear(JobAdvanced("k", "", {"b": 1}, None))
        at.engines["b"].hang.set()
        await asyncio.sleep(0.1)
        assert [record.cause for record in at.records] == ["start", BURST, BURST]
        await asyncio.gather(first, second)


@simulated
async def test_calls_to_an_engine_whose_memory_was_just_given_away_are_a_burst() -> None:
    async with rig(every_s=10) as at:
        await asyncio.sleep(1)
        first = asyncio.create_task(at.ask("a", 700))
        await asyncio.sleep(0.001)
        at.controller.hear(JobAdvanced("j", "", {"a": 1}, None))
        await asyncio.sleep(0.05)
        assert at.share("b") < 0.15
        second = asyncio.create_task(at.ask("b", 200))  # it had room for them before
        await asyncio.sleep(0.001)
        at.controller.hear(JobAdvanced("k", "", {"b": 1}, None))
        await asyncio.sleep(0.05)
        assert [record.cause for record in at.records] == ["start", BURST, BURST]
        assert at.share("b") > 0.15
        await asyncio.gather(first, second)


@simulated
async def test_it_decides_twice_as_often_while_memory_is_short() -> None:
    async with rig(every_s=0.1) as at:
        await asyncio.sleep(1.05)
        calm = len(at.records)
        work = asyncio.create_task(at.keep_busy("a"))
        await asyncio.sleep(0.5)
        before = len(at.records)
        await asyncio.sleep(1)
        assert (calm, len(at.records) - before) == (11, 20)
        work.cancel()


@simulated
async def test_with_every_engine_pinned_there_is_nothing_to_decide() -> None:
    async with rig("round_robin") as at:
        at.controller.pin("a", Grant(0.5, 500, 2048))
        at.controller.pin("b", Grant(0.2, 500, 2048))
        await asyncio.sleep(1)
        assert (at.share("a"), at.share("b")) == (0.5, 0.2)
        assert at.controller.counts.faults == 0


@simulated
async def test_a_foreign_process_shrinks_the_budget_before_memory_runs_out() -> None:
    async with rig() as at:
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 900 * MIB),))
        await asyncio.sleep(0.3)  # 100 free: 80 more than is held, but no more than the budget
        assert at.share("a") == 0.4
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB),))
        await asyncio.sleep(0.15)  # nothing free: the reserve of 20 MiB is taken from ours, again at every tick
        assert at.share("a") + at.share("b") < 0.8
        assert at.records[-1].snapshot.device.foreign_bytes > 0
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 200 * MIB),))
        await asyncio.sleep(1)
        assert at.share("a") == at.share("b") == 0.4


@simulated
async def test_the_hosts_memory_counts_for_engines_on_a_gpu_without_its_own() -> None:
    async with rig() as at:
        for engine in at.engines.values():
            engine._limits = replace(engine.limits, device_uuid="11111111-1111-1111-1111-111111111111")
        at.reading = Reading("host", (DeviceReading("host", 1000 * MIB, 1000 * MIB),))
        await asyncio.sleep(0.15)
        device = at.records[-1].snapshot.device
        assert (device.fault, device.used_bytes) == (None, 1000 * MIB)
        assert at.share("a") + at.share("b") < 0.8


@simulated
async def test_while_telemetry_is_silent_the_budget_stays_cut() -> None:
    """What another process took, it may still have."""
    async with rig() as at:
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB),))
        await asyncio.sleep(0.5)
        cut = at.records[-1].snapshot.budget_bytes
        assert cut < 800 * MIB
        for silent in (
            Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB, fault="GPU is lost"),)),
            Reading("gpu", (), "driver not loaded"),
        ):
            at.reading = silent
            await asyncio.sleep(0.5)
            assert at.records[-1].snapshot.budget_bytes == cut
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 100 * MIB),))
        await asyncio.sleep(0.5)
        assert at.records[-1].snapshot.budget_bytes == 800 * MIB


@simulated
async def test_a_lost_gpu_leaves_the_budget_and_is_in_the_record() -> None:
    async with rig() as at:
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1000 * MIB, fault="GPU is lost"),))
        await asyncio.sleep(0.5)
        assert at.records[-1].snapshot.device.fault == "GPU is lost"
        assert at.share("a") == 0.4
        at.reading = Reading("gpu", (), "driver not loaded")
        await asyncio.sleep(0.5)
        assert at.records[-1].snapshot.device.fault == "driver not loaded"


@simulated
async def test_a_policy_that_raises_leaves_the_last_grants_and_is_named() -> None:
    async with rig(Broken(Value())) as at:
        await asyncio.sleep(1)
        assert at.share("a") == 0.4
        assert at.records[-1].fault == "policy chosen raised RuntimeError('broken')"
        assert at.controller.counts.faults == at.controller.counts.decisions > 5
        at.controller.pin("b", Grant(0.3, 500, 2048))
        await asyncio.sleep(0.5)
        assert at.share("b") == 0.3
        at.controller.unpin("b")
        at.controller.use(ContainedPolicy("waterfill", catalogue.make("waterfill")))
        work = asyncio.create_task(at.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert at.share("a") > 0.6
        work.cancel()


@simulated
async def test_an_engine_that_hangs_in_a_resize_stops_neither_the_loop_nor_the_others() -> None:
    async with rig(names="abc") as at:
        at.engines["b"].hang.clear()
        work = asyncio.create_task(at.keep_busy("a"))
        await asyncio.sleep(3)
        assert set(at.records[-1].snapshot.engines) == {"a", "c"}
        assert at.share("a") > 0.4  # from c: what b was to give has not come
        assert sum(at.ledger.held.values()) <= 800 * MIB
        before = len(at.records)
        await asyncio.sleep(3)
        assert len(at.records) > before + 20
        at.engines["b"].hang.set()
        await asyncio.sleep(1)
        assert set(at.records[-1].snapshot.engines) == {"a", "b", "c"}
        assert at.share("a") > 0.5
        assert at.controller.counts.faults == 0
        work.cancel()


@simulated
async def test_a_dead_engine_is_left_out_and_its_memory_kept_for_it() -> None:
    async with rig() as at:
        at.engines["b"].kill()
        work = asyncio.create_task(at.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert set(at.records[-1].snapshot.engines) == {"a"}
        assert at.records[-1].snapshot.budget_bytes == 400 * MIB
        assert at.share("a") == 0.4
        work.cancel()


@simulated
async def test_pause_pin_and_another_policy_while_it_runs() -> None:
    async with rig() as at:
        at.controller.pin("b")
        work = asyncio.create_task(at.keep_busy("a"))
        await asyncio.sleep(0.5)
        assert (at.share("a"), at.share("b")) == (0.4, 0.4)
        at.controller.pin("b", Grant(0.3, 500, 2048))
        await asyncio.sleep(0.5)
        assert (at.share("a"), at.share("b")) == (0.5, 0.3)
        at.controller.pause()
        await asyncio.sleep(0.2)
        at.controller.unpin("b")
        before = len(at.records)
        await asyncio.sleep(1)
        assert len(at.records) == before
        assert (at.share("a"), at.share("b")) == (0.5, 0.3)
        at.controller.resume()
        await asyncio.sleep(0.5)
        assert at.share("b") < 0.15
        at.controller.use(ContainedPolicy("static", catalogue.make("static")))
        await asyncio.sleep(1)
        assert (at.share("a"), at.share("b")) == (0.4, 0.4)
        assert at.controller.policy == at.records[-1].policy == "static"
        work.cancel()


@simulated
async def test_what_cannot_be_pinned_says_why() -> None:
    async with rig() as at:
        with pytest.raises(TroupeError, match="there is no engine 'c'; there are a, b"):
            at.controller.pin("c")
        with pytest.raises(TroupeError, match=r"engine a: gpu_memory_utilization 0\.01 is below"):
            at.controller.pin("a", Grant(0.01, 1, 2048))
        assert not at.controller.pinned


@simulated
async def test_a_pin_that_leaves_others_less_than_their_floors_is_refused_with_what_fits() -> None:
    async with rig(names="abc") as at:
        with pytest.raises(InputError) as refused:  # floors of 110 MiB each: 800 - 220 are left for a
            at.controller.pin("a", Grant(0.6, 500, 2048))
        assert str(refused.value) == (
            "engine a: gpu_memory_utilization 0.6 would leave the other engines less than their floors and pins;"
            " at most 0.58 fits"
        )
        assert not at.controller.pinned
        at.controller.pin("a", Grant(0.58, 500, 2048))
        await asyncio.sleep(0.5)
        assert [at.share(name) for name in "abc"] == [0.58, 0.11, 0.11]


@simulated
async def test_pins_are_refused_for_what_they_leave_together() -> None:
    async with rig(names="abc") as at:
        at.controller.pin("a", Grant(0.4, 500, 2048))
        with pytest.raises(InputError, match=r"engine b: .* at most 0\.29 fits"):
            at.controller.pin("b", Grant(0.3, 500, 2048))
        at.controller.pin("b", Grant(0.29, 500, 2048))
        at.controller.pin("a", Grant(0.2, 500, 2048))  # in place of the first
        await asyncio.sleep(0.5)
        assert [at.share(name) for name in "abc"] == [0.2, 0.29, 0.31]
        assert at.controller.counts.rejected == 0


@simulated
async def test_a_pin_that_no_longer_fits_a_cut_budget_is_reported_and_stalls_nothing() -> None:
    async with rig(names="abc") as at:
        at.controller.pin("a", Grant(0.3, 500, 2048))
        at.controller.pin("b", Grant(0.35, 500, 2048))
        await asyncio.sleep(0.5)
        work = asyncio.create_task(at.keep_busy("c"))
        at.controller.use(at.controller._guard, 600 * MIB)  # 270 above the floors: 190 for a's pin, not 240 for b's
        await asyncio.sleep(1)
        assert at.share("a") == 0.3
        assert at.share("c") > 0.15  # policies decide about b and c
        assert sum(at.ledger.held.values()) <= 600 * MIB
        assert [*at.controller.pinned] == ["a", "b"]
        assert [*at.controller.unfit_pins] == ["b"]
        assert "at most 0.19 fits" in at.controller.unfit_pins["b"]
        assert at.records[-1].unfit_pins == at.controller.unfit_pins
        before = at.controller.counts.rejected
        at.controller.use(at.controller._guard, 800 * MIB)
        await asyncio.sleep(1)
        assert (at.share("a"), at.share("b")) == (0.3, 0.35)
        assert at.controller.unfit_pins == {}
        assert at.controller.counts.rejected == before == 0
        work.cancel()


@simulated
async def test_a_foreign_process_that_leaves_no_room_for_a_pin_stalls_nothing() -> None:
    async with rig() as at:
        at.controller.pin("a", Grant(0.6, 500, 2048))
        await asyncio.sleep(0.5)
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1080 * MIB),))
        await asyncio.sleep(0.15)
        assert [*at.controller.unfit_pins] == ["a"]
        assert sum(at.ledger.held.values()) <= at.records[-1].snapshot.budget_bytes < 800 * MIB
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 200 * MIB),))
        await asyncio.sleep(0.5)
        assert (at.share("a"), at.controller.unfit_pins) == (0.6, {})
        at.reading = Reading("gpu", (DeviceReading("GPU", 1000 * MIB, 1080 * MIB),))
        await asyncio.sleep(0.15)
        at.controller.pause()
        at.controller.unpin("a")
        assert at.controller.unfit_pins == {}


@simulated
async def test_a_pin_below_the_floor_of_an_engine_that_restarted_larger_stalls_nothing() -> None:
    async with rig(names="abc") as at:
        at.controller.pin("a", Grant(0.15, 500, 2048))
        await asyncio.sleep(0.5)
        at.engines["a"]._limits = replace(at.engines["a"].limits, fixed_bytes=160 * MIB)
        at.engines["a"].grant = Grant(0.17, 500, 2048)
        work = asyncio.create_task(at.keep_busy("b"))
        await asyncio.sleep(1)
        assert at.controller.unfit_pins == {"a": "gpu_memory_utilization 0.15 is below the engine's floor of 0.1700"}
        assert at.share("b") > 0.4
        assert at.controller.counts.rejected == 0
        work.cancel()


@simulated
async def test_an_engine_that_takes_no_grants_cannot_be_pinned() -> None:
    async with rig() as at:
        at.engines["a"].kill()
        with pytest.raises(InputError, match="engine a is dead and takes no grant now; pin it once it is ready"):
            at.controller.pin("a")


@simulated
async def test_a_shadow_decides_and_moves_nothing() -> None:
    async with rig("static", shadow="round_robin") as at:
        await asyncio.sleep(3)
        assert (at.share("a"), at.share("b")) == (0.4, 0.4)
        assert at.records[-1].shadow_policy == "round_robin"
        shadow = at.records[-1].shadow
        assert shadow is not None
        assert {round(grant.gpu_memory_utilization, 2) for grant in shadow.grants.values()} == {0.11, 0.69}


@simulated
async def test_telemetry_that_raises_costs_ticks_and_not_the_loop() -> None:
    async with rig() as at:
        good, at.reading = at.reading, None  # type: ignore[assignment]
        await asyncio.sleep(0.5)
        assert at.controller.counts.faults > 2
        at.reading = good
        before = len(at.records)
        await asyncio.sleep(0.5)
        assert len(at.records) > before


@simulated
async def test_memory_moves_between_the_others_while_an_engine_is_started_again() -> None:
    async with rig(names="abc") as found:
        may_start = asyncio.Event()
        may_start.set()

        class Restarting(Slow):
            async def start(self) -> None:
                await may_start.wait()
                await super().start()

        supervised = SupervisedEngine("a", lambda grant: Restarting("a", 0.8 / 3), patience=Patience(backoff_s=(0,)))
        found.handles["a"] = supervised
        await supervised.start()
        may_start.clear()
        supervised.kill()
        work = asyncio.create_task(found.keep_busy("b"))
        await asyncio.sleep(5)
        assert supervised.stats().state is EngineState.STARTING
        assert found.controller.counts.faults == 0
        assert found.share("b") > 0.4  # of 0.27 at first
        assert found.ledger.held["a"] == int(0.8 / 3 * DEVICE)
        may_start.set()
        await asyncio.sleep(5)
        assert supervised.stats().state is EngineState.READY
        assert found.controller.counts.faults == 0
        work.cancel()
        await supervised.close()


@simulated
async def test_a_failing_tick_is_tried_again_at_its_time_and_logged_once() -> None:
    async with rig(every_s=0.1) as found:
        await asyncio.sleep(0.5)
        with pytest.MonkeyPatch.context() as patch:
            failed = 0

            def fail(*arguments: object) -> Snapshot:
                nonlocal failed
                failed += 1
                raise RuntimeError("no snapshot")

            patch.setattr(found.controller, "_observe", fail)
            with logged("runtime.control.controller") as lines:
                for _ in range(500):
                    found.controller.wake(BURST)
                    await asyncio.sleep(0.01)
        assert 0 < failed <= 5 / 0.1
        assert lines == ["a tick of the controller failed"]
        decided = found.controller.counts.decisions
        await asyncio.sleep(0.5)
        assert found.controller.counts.decisions > decided


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """The messages that a logger gets."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(name).removeHandler(handler)
