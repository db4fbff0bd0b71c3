"""Snapshots say for how long an engine is paused, completes no step, and completes no reply."""

import asyncio
from dataclasses import replace

import pytest

from runtime.control.forecast import Forecast
from runtime.control.snapshot import EngineView, Snapshot
from runtime.control.snapshotter import Snapshotter
from runtime.engines.fake import FakeEngine
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState, EngineStats, Work
from runtime.telemetry.reading import DeviceReading, Reading

pytestmark = pytest.mark.virtual_time


class Reporting(FakeEngine):
    """An engine that reports what a test sets."""

    def __init__(self) -> None:
        super().__init__("a", lambda request: "")
        self.running = 0
        self.steps = 7
        self.admits = True
        self.state_now = EngineState.READY

    def stats(self) -> EngineStats:
        grant = Grant(1.0, 64 if self.admits else 0, 2048)
        work = Work(steps=self.steps)
        return replace(super().stats(), state=self.state_now, grant=grant, running=self.running, work=work)


class Rig:
    """A snapshotter of one engine."""

    def __init__(self) -> None:
        self.engine = Reporting()
        self._snapshotter = Snapshotter({"a": self.engine}, Forecast())

    async def after(self, seconds: float) -> EngineView:
        """Return the engine's view after some time."""
        return (await self._take(seconds)).engines["a"]

    async def without_view(self, seconds: float) -> bool:
        """Return True if the engine is not in the snapshot after some time."""
        return not (await self._take(seconds)).engines

    async def _take(self, seconds: float) -> Snapshot:
        await asyncio.sleep(seconds)
        return self._snapshotter.take(asyncio.get_running_loop().time(), 1000, 0)


async def test_an_engine_that_never_ends_its_first_step_is_stalled() -> None:
    """It reports no running request before the step has ended."""
    rig = Rig()
    await rig.engine.start()
    await rig.after(10)
    assert (await rig.after(1)).stalled_s == 0  # it has no request
    with rig.engine.usage.request(0):
        assert (await rig.after(3)).stalled_s == 3
        rig.engine.steps += 1
        assert (await rig.after(1)).stalled_s == 0


async def test_an_engine_is_not_stalled_by_its_pause() -> None:
    """After a preemption it may report requests as running, and make no step because it is paused."""
    rig = Rig()
    await rig.engine.start()
    with rig.engine.usage.request(0):
        await rig.after(1)
        rig.engine.admits, rig.engine.running = False, 1
        await rig.after(1)
        assert (await rig.after(5)).stalled_s == 5  # so that its pause is overdue in time
        rig.engine.admits = True
        assert (await rig.after(1)).stalled_s == 0  # its turn begins
        assert (await rig.after(3)).stalled_s == 3


async def test_a_pause_lasts_until_a_request_runs() -> None:
    rig = Rig()
    await rig.engine.start()
    rig.engine.admits = False
    await rig.after(1)
    with rig.engine.usage.request(0):
        assert (await rig.after(4)).paused_s == 4
        rig.engine.admits = True
        assert (await rig.after(1)).paused_s == 5
        rig.engine.running = 1
        assert (await rig.after(1)).paused_s == 0


async def test_an_engine_with_requests_is_unanswered_until_it_completes_a_reply() -> None:
    rig = Rig()
    await rig.engine.start()
    await rig.after(10)
    assert (await rig.after(1)).unanswered_s == 0
    with rig.engine.usage.request(0):
        with rig.engine.usage.request(0):
            assert (await rig.after(3)).unanswered_s == 3
        assert (await rig.after(1)).unanswered_s == 4  # the request was aborted
        rig.engine.usage.answered += 1
        assert (await rig.after(1)).unanswered_s == 0
        assert (await rig.after(2)).unanswered_s == 2


async def test_memory_that_a_waking_engine_has_claimed_is_not_promised_to_others() -> None:
    """Another process holds 20 of 100 bytes. A reading counts what the engine has claimed as free until it takes it."""
    awake, waking = Reporting(), Reporting()
    readings = Reading("gpu", ())
    snapshotter = Snapshotter({"a": awake, "b": waking}, Forecast(), reading=lambda: readings)
    waking.state_now = EngineState.ASLEEP

    def budget(used_bytes: int, claimed_bytes: int) -> int:
        nonlocal readings
        readings = Reading("gpu", (DeviceReading("GPU", 100, used_bytes),))
        return snapshotter.take(0.0, 98, claimed_bytes).budget_bytes

    await awake.start()
    await waking.start()
    assert budget(used_bytes=78, claimed_bytes=58) == 78
    waking.state_now = EngineState.WAKING
    assert budget(used_bytes=60, claimed_bytes=58) == 78
    assert budget(used_bytes=85, claimed_bytes=58) == 71  # another process takes more than that
    waking.state_now = EngineState.READY
    assert budget(used_bytes=78, claimed_bytes=58) == 78


async def test_an_engine_that_sleeps_is_neither_paused_nor_stalled() -> None:
    rig = Rig()
    await rig.engine.start()
    rig.engine.admits = False
    await rig.after(1)
    with rig.engine.usage.request(0):
        await rig.after(5)
        rig.engine.state_now = EngineState.ASLEEP
        assert await rig.without_view(600)
        rig.engine.state_now = EngineState.READY
        woken = await rig.after(1)
        assert (woken.paused_s, woken.stalled_s, woken.unanswered_s) == (0, 0, 1)
