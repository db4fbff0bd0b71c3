"""A device on another node, as the head sees it."""

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Self

from runtime.cluster import wire
from runtime.cluster.link import EXPECT_S, Link
from runtime.cluster.remote_engine import RemoteEngine
from runtime.control import pins
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import Counts
from runtime.control.decision_log import Record
from runtime.control.snapshot import Snapshot
from runtime.devices.handle import Terms
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineHandle
from runtime.engines.ledger import Ledger
from runtime.errors import ConfigError, InputError, TroupeError
from runtime.events import CallPaused, Event, JobAdvanced
from runtime.residency import keeper
from runtime.residency.policy import ResidencyPolicy

Post = Callable[[wire.ToAgent], None]


class RemoteDevice:
    """A device that an agent controls. What is shown of it is from the agent's latest report."""

    def __init__(self, name: str, link: Link, report: wire.DeviceReport) -> None:
        self.name = name
        self._gone = False
        self._changed = asyncio.Event()
        self.engines: Mapping[str, RemoteEngine] = {
            replica: RemoteEngine(replica, link, each, self._expect_soon) for replica, each in report.engines.items()
        }
        self.controller = RemoteController(name, self.engines, link.post, self._expect_soon)
        self.keeper = RemoteKeeper(name, link.post)
        self.sharing = RemoteMemory()
        self._link = link
        self._terms: Terms | None = None
        self._telling: asyncio.Task[None] | None = None
        self.update(report)

    @property
    def lost(self) -> bool:
        """True if its agent does not answer, or no longer has the device."""
        return self._gone or self._link.lost is not None

    def lose(self, gone: bool = False) -> None:
        """Note that the device is lost. With `gone`, its agent answers but no longer has it."""
        self._gone = gone
        for engine in self.engines.values():
            engine.gone = gone
            engine.lose()

    def device(self, name: str, terms: Terms) -> "RemoteDevice":
        """Control the device on these terms while it is entered. Its agent knows everything but what is expected."""
        assert name == self.name, name
        self._terms = terms
        return self

    def update(self, report: wire.DeviceReport) -> None:
        """Take the figures of a report."""
        self._gone = False
        for replica, each in report.engines.items():
            self.engines[replica].gone = False
            self.engines[replica].update(each)
        self.sharing.update(report)
        self.controller.update(report)
        self.keeper.update(report)

    def record(self, record: Record) -> None:
        """Log and publish a decision of the agent."""
        record = replace(record, snapshot=replace(record.snapshot, now_s=asyncio.get_running_loop().time()))
        self.controller.snapshot = record.snapshot
        if self._terms is None:
            return
        if self._terms.log is not None:
            with suppress(TroupeError):  # the disk is full: the decision has been carried out all the same
                self._terms.log.write(record)
        self._terms.publish(record)

    async def add(self, replica: str) -> None:
        await self._link.call(lambda number: wire.Add(number, replica))

    async def remove(self, replica: str) -> None:
        await self._link.call(lambda number: wire.Remove(number, replica))

    async def __aenter__(self) -> Self:
        self._telling = asyncio.create_task(self._tell(), name=f"tell {self.name}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._telling is not None
        self._telling.cancel()
        await asyncio.wait([self._telling])

    def _expect_soon(self) -> None:
        self._changed.set()

    async def _tell(self) -> None:
        """Tell the agent what the device's engines can expect, regularly and when jobs advance."""
        assert self._terms is not None
        forecast, times = self._terms.forecast, self._terms.call_times
        while True:
            expected = wire.Expected(
                forecast.open_calls(),
                forecast.soon({}),
                forecast.coming(),
                times.next_call_s(),
                times.lead_s(),
                {name: engine.waiting for name, engine in self.engines.items() if engine.waiting},
            )
            self._link.post(wire.Expect({self.name: expected}))
            await asyncio.sleep(EXPECT_S / 10)
            with suppress(TimeoutError):
                async with asyncio.timeout(EXPECT_S):
                    await self._changed.wait()
            self._changed.clear()


class RemoteMemory:
    """The ledger of a device on another node: see Sharing."""

    def __init__(self) -> None:
        self.ledger = Ledger(0)
        self.reserved_bytes = 0

    def update(self, report: wire.DeviceReport) -> None:
        """Take the figures of a report."""
        self.reserved_bytes = report.reserved_bytes
        self.ledger.budget_bytes = report.budget_bytes
        for name, nbytes in report.held.items():
            self.ledger.record(name, nbytes)


class RemoteController:
    """The controller of a device on another node: see Controller."""

    def __init__(
        self, device: str, engines: Mapping[str, RemoteEngine], post: Post, on_change: Callable[[], None]
    ) -> None:
        self.counts = Counts()
        self.paused = False
        self.policy = ""
        self.snapshot: Snapshot | None = None
        self.pinned: dict[str, Grant] = {}
        self.unfit_pins: Mapping[str, str] = {}
        self._device = device
        self._remote_engines = engines
        self._post = post
        self._on_change = on_change
        self._last = wire.ControlCounts()
        self._wanted: dict[str, wire.ToAgent] = {}

    def begin(self) -> None:
        """Repeat all earlier changes to an agent that has been attached."""
        for message in self._wanted.values():
            self._post(message)

    def _want(self, key: str, message: wire.ToAgent) -> None:
        self._wanted[key] = message
        self._post(message)

    @property
    def engines(self) -> Mapping[str, EngineHandle]:
        """The engines of the device."""
        return self._remote_engines

    def update(self, report: wire.DeviceReport) -> None:
        """Take the figures of a report. Counts begin anew if the agent has."""
        new, old = report.counts, self._last
        if new.decisions < old.decisions:
            old = wire.ControlCounts()
        self.counts.decisions += new.decisions - old.decisions
        self.counts.faults += new.faults - old.faults
        self.counts.resizes += new.resizes - old.resizes
        self.counts.rejected += new.rejected - old.rejected
        self.counts.moved_bytes += new.moved_bytes - old.moved_bytes
        self.counts.preempted += new.preempted - old.preempted
        self.counts.reactions_s.extend(new.reactions_s)
        self._last = new
        self.policy, self.paused = report.policy, report.paused
        self.pinned, self.unfit_pins = dict(report.pinned), report.unfit_pins

    def look(self) -> None:
        """Do nothing: the agent looks when a request arrives."""

    def on_event(self, event: Event) -> None:
        """Tell the agent soon what is expected now."""
        if isinstance(event, JobAdvanced | CallPaused):
            self._on_change()

    def use(self, policy: ContainedPolicy, budget_bytes: int | None = None) -> None:
        """Let another policy decide from now on, within another budget if one is given."""
        self.policy = policy.name
        self._want("policy", wire.UsePolicy(self._device, policy.choice.model_dump(mode="json"), budget_bytes))

    def pause(self) -> None:
        """Stop deciding until `resume`."""
        self.paused = True
        self._want("pause", wire.Pause(self._device, True))

    def resume(self) -> None:
        """Start deciding again."""
        self.paused = False
        self._want("pause", wire.Pause(self._device, False))

    def current_grant(self, engine: str) -> Grant:
        """Return an engine's grant, with its admission open. Raises NotFound and InputError."""
        silent = [name for name, each in self._remote_engines.items() if each.silent]
        return pins.current_grant(self._remote_engines, silent, engine)

    def pin(self, engine: str, grant: Grant) -> None:
        """Hold an engine at a grant. Raises NotFound and InputError, and then nothing changes."""
        pins.require(self._remote_engines, engine)
        if self.snapshot is None:
            raise InputError(f"engine {engine}: its device has not decided yet; try again in a moment")
        self.pinned = pins.with_pin(self.snapshot, self.pinned, engine, grant)
        self._want(f"pin {engine}", wire.Pin(self._device, engine, self.pinned[engine]))

    def unpin(self, engine: str) -> None:
        """Let policies decide about an engine again. Raises NotFound."""
        pins.require(self._remote_engines, engine)
        self.pinned.pop(engine, None)
        self._want(f"pin {engine}", wire.Pin(self._device, engine, None))


class RemoteKeeper:
    """The keeper of a device on another node: see Keeper."""

    def __init__(self, device: str, post: Post) -> None:
        self.counts = keeper.Counts()
        self.policy = ""
        self._device = device
        self._post = post
        self._job_wait_s = math.inf

    def update(self, report: wire.DeviceReport) -> None:
        """Take the figures of a report."""
        self.counts, self.policy = report.residency_counts, report.residency_policy
        self._job_wait_s = report.job_wait_s

    async def begin(self, policy: ResidencyPolicy) -> None:
        """Raise ConfigError: residency policies cannot be compared on a cluster."""
        raise ConfigError(f"the residency policy {policy.name} cannot be changed on a cluster; leave out --residency")

    def expect_job(self) -> float:
        """Return how long a job that began now would wait, and let the agent expect one."""
        if math.isinf(self._job_wait_s):
            return 0.0
        if self._job_wait_s:
            self._post(wire.ExpectJob(self._device))
        return self._job_wait_s

    def look(self) -> None:
        """Do nothing: the agent looks when a request arrives."""

    def wait_of_job_s(self) -> float:
        """Return how long a job that began now would wait for an engine here; infinity if jobs begin with others."""
        return self._job_wait_s
