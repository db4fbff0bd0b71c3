"""Runs the engines on the devices of one node, and serves them to the head.

The head attaches itself, sends a plan, and then messages. The agent puts its messages, and a beat every 100 ms, into
one outbox, which the head reads in batches. Each device is controlled here, so that memory keeps moving if the head is
gone.

A new head, or the same one after a pause, attaches itself under a new epoch. The calls of the old epoch are cancelled
then, or when the head has been silent for `lost_s`. Engines keep their weights. The agent ends after `orphan_s` without
a head.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import AsyncExitStack, ExitStack, aclosing, suppress
from importlib.metadata import version
from pathlib import Path

from runtime.cluster import wire
from runtime.cluster.attachment import Attachment, Refused
from runtime.cluster.plan import MEASURED, POLICY, Attached, Plan, Timeouts
from runtime.config import PolicyChoice
from runtime.control import decision_log
from runtime.control.contained_policy import ContainedPolicies
from runtime.control.decision_log import Record
from runtime.devices.device import Device
from runtime.devices.handle import Policies, Terms
from runtime.devices.start import Start, StartedFleet, add_absent, measured, sampled, start_placed
from runtime.engines.fleet import OnState
from runtime.engines.handle import EngineHandle, EngineState, Recalled
from runtime.engines.launcher import Launcher
from runtime.engines.replicas import engine_of, metered
from runtime.engines.vllm_import import import_with_vllm
from runtime.errors import Death, EngineDead, EngineError, TroupeError
from runtime.residency import catalogue as residency_catalogue

BEAT_S = 0.1
HELD_UP_S = 3 * BEAT_S
"""Seconds between two looks at the head after which the agent's event loop counts as blocked."""
HELD_MOST = 16
"""The most connections that an agent holds. It closes others at once."""
NOTHING = wire.Expected({}, {}, {}, {}, {}, {})
StartEngines = Callable[[str, Plan, AsyncExitStack, OnState], Awaitable[Mapping[str, StartedFleet]]]
"""Starts the engines of a plan on a node. The agent closes the stack when it ends. See start_engines."""
UNFINISHED = "unfinished"
"""The fingerprint of an agent whose head went away while the engines started."""


class Agent:
    """The agent of one node, or of a part of its devices.

    `on_orphaned` is called when the agent has ended because no head came. `start` starts the engines of a plan. The
    agent accepts a connection of the head at `host`. The connection closes when the agent's process ends, even by
    SIGKILL.
    """

    def __init__(
        self, name: str, on_orphaned: Callable[[], None] = lambda: None, start: StartEngines | None = None
    ) -> None:
        self.name = name
        self.host: str | None = None
        self._holding: asyncio.Server | None = None
        self._held = 0
        self._changing: set[asyncio.Task[None]] = set()
        self._start_engines = start or start_engines
        self._on_orphaned = on_orphaned
        self._attachment: Attachment | None = None
        self._epoch = 0
        self._looked_s = -math.inf
        self._closing = False
        self._plan: Plan | None = None
        self._timeouts = Timeouts()
        self._started = False
        self._owned = AsyncExitStack()
        self._fleets: Mapping[str, StartedFleet] = {}
        self._devices: dict[str, Device] = {}
        self._expected: dict[str, _PushedForecast] = {}
        self._waiting: dict[str, list[ExitStack]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def attach(self, head: str, wire_version: int) -> bytes:
        """Serve this head from now on. Return an `Attached`.

        Raises Refused if the agent serves another head that may be alive, or if this head has another version.
        """
        if wire_version != wire.VERSION:
            raise Refused(
                f"node {self.name} has version {version('troupe-llm')} of Troupe, whose messages have version "
                f"{wire.VERSION}; the head's have version {wire_version}; install the same Troupe on both"
            )
        if self._holding is None and self.host is not None:
            with suppress(OSError):  # the address is not one of this machine's; the beat shows that the agent lives
                self._holding = await asyncio.start_server(self._hold, self.host, 0)
        if self._closing:
            raise Refused(f"the agent of node {self.name} is ending")
        now_s = asyncio.get_running_loop().time()
        if not self._tasks:
            self._looked_s = now_s
            self._tasks.append(asyncio.create_task(self._watch_head(), name="watch the head"))
        last = self._attachment
        # If this process was held up, the other head may have said something that has not been read yet.
        may_live = now_s - self._looked_s > HELD_UP_S or (
            last is not None and now_s - last.heard_s < self._timeouts.lost_s
        )
        if last is not None and last.head != head and last.over is None and may_live:
            raise Refused(
                f"node {self.name} serves another head, {last.head}; stop that one first, or give this one a "
                "cluster.namespace of its own"
            )
        if last is not None:
            self._end(last, f"node {self.name} serves another head now, {head}")
        self._epoch += 1
        self._attachment = Attachment(self._epoch, head, self._obey)
        pulse = None if self._holding is None else self._holding.sockets[0].getsockname()[:2]
        plan = self._plan
        return Attached(
            self._epoch,
            fingerprint=(plan.common.fingerprint if self._started else UNFINISHED) if plan else None,
            measured=measured(self._fleets) if self._started else {},
            pulse=pulse,
        ).to_json()

    async def gpus(self) -> list[int]:
        """Return the numbers of the GPUs on this node, as NVML counts. None without GPUs."""
        vllm_engine = await asyncio.to_thread(import_with_vllm, "runtime.engines.vllm_engine")
        return list(vllm_engine.visible_gpus())

    async def start(self, plan: bytes) -> bytes:
        """Start the engines of a plan. Return what they have measured, by engine. Raises EngineError."""
        self._plan = made = Plan.from_json(plan)
        self._timeouts = made.common.timeouts
        self._fleets = await self._start_engines(self.name, made, self._owned, self._on_state)
        return MEASURED.dump_json(measured(self._fleets))

    async def control(self, known: bytes) -> None:
        """Add the absent replicas, given what is known of all engines, and control the devices. Raises EngineError."""
        assert self._plan is not None
        common = self._plan.common
        add_absent(self._fleets, self._plan.absent, MEASURED.validate_json(known), common.may_sleep)
        policies = self._owned.enter_context(ContainedPolicies(common.control.policy, common.control.shadow))
        for name, started in (await sampled(self._owned, self._fleets)).items():
            for replica, engine in started.engines.items():
                engine.on_death = _Reporter(self, replica)
            self._expected[name] = expected = _PushedForecast()
            shares, shadow = policies.make()
            residency = residency_catalogue.make(common.residency.name, common.residency.options)
            terms = Terms(
                expected,
                expected,
                {each: common.requirements[engine_of(each)] for each in started.engines},
                [each for each in started.engines if engine_of(each) in common.may_sleep],
                common.control,
                Policies(shares, shadow, residency),
                self._publish,
            )
            self._devices[name] = await self._owned.enter_async_context(started.device(name, terms))
        self._policies = policies
        self._started = True
        self._tasks.append(asyncio.create_task(self._beat(), name="beat"))

    async def outbox(self, epoch: int) -> AsyncIterator[bytes]:
        """Yield the agent's messages of an epoch: see Attachment.outbox."""
        attachment = self._attachment
        if attachment is None or attachment.epoch != epoch:
            raise Refused(f"node {self.name} serves another head now")
        async for data in attachment.outbox():
            yield data

    async def take(self, epoch: int, number: int, data: bytes) -> None:
        """Take messages of the head: see Attachment.take. Those of another epoch are ignored."""
        if self._attachment is not None and self._attachment.epoch == epoch:
            self._attachment.take(number, data)

    async def close(self) -> None:
        """Stop the engines and free everything."""
        self._closing = True
        if self._attachment is not None:
            self._end(self._attachment, f"the agent of node {self.name} is ending")
        ending = [*self._tasks, *self._changing]
        for task in ending:
            if task is not asyncio.current_task():
                task.cancel()
        if self._changing:
            await asyncio.wait([*self._changing])
        if self._holding is not None:
            self._holding.close()
        await self._owned.aclose()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hold a connection until the other side closes it or sends something."""
        try:
            if self._held < HELD_MOST:
                self._held += 1
                try:
                    with suppress(OSError):
                        await reader.read(1)
                finally:
                    self._held -= 1
        finally:
            writer.close()

    def _say(self, item: wire.FromAgent) -> None:
        if self._attachment is not None:
            self._attachment.say(item)

    def _end(self, attachment: Attachment, why: str) -> None:
        """End an attachment, and drop the calls that its head expected."""
        attachment.end(why)
        for expected in self._expected.values():
            expected.push(NOTHING)
        for replica in self._waiting:
            self._count_waiting(replica, 0)

    def _obey(self, attachment: Attachment, message: wire.ToAgent) -> None:
        match message:
            case wire.Generate():
                attachment.begin(message.number, self._generate(attachment, message))
            case wire.UntilReady():
                attachment.begin(message.number, self._until_ready(message.replica))
            case wire.Add():
                self._change_replicas(attachment, message.number, self._add(message.replica))
            case wire.Remove():
                self._change_replicas(attachment, message.number, self._remove(message.replica))
            case wire.Excuse():
                self._device_of(message.replica).engines[message.replica].excuse_death()
            case wire.Abort():
                attachment.abort(message.number)
            case wire.Expect():
                for name, expected in message.devices.items():
                    if name in self._expected:
                        self._expected[name].push(expected)
                        for replica in self._devices[name].engines:
                            self._count_waiting(replica, expected.waiting.get(replica, 0))
            case wire.ExpectJob():
                self._devices[message.device].keeper.expect_job()
            case wire.Pause():
                controller = self._devices[message.device].controller
                (controller.pause if message.paused else controller.resume)()
            case wire.Pin() | wire.UsePolicy():
                try:
                    self._change(message)
                except TroupeError as error:  # the head has checked it, but the engine has changed since
                    logging.getLogger(__name__).warning("%s", error)

    def _change(self, message: wire.Pin | wire.UsePolicy) -> None:
        controller = self._devices[message.device].controller
        if isinstance(message, wire.UsePolicy):
            choice: PolicyChoice = POLICY.validate_python(message.policy)
            controller.use(self._policies.contain(choice), message.budget_bytes)
        elif message.grant is None:
            controller.unpin(message.replica)
        else:
            controller.pin(message.replica, message.grant)

    def _device_of(self, replica: str) -> Device:
        for device in self._devices.values():
            if replica in device.engines:
                return device
        raise EngineDead(f"node {self.name} has no engine {replica}", Death.KILLED)

    def _change_replicas(self, attachment: Attachment, number: int, work: Coroutine[None, None, None]) -> None:
        """Begin a call that runs to its end, because a start that is cancelled midway would leave memory claimed."""
        task = attachment.begin(number, work, ends_with_head=False)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)

    async def _add(self, replica: str) -> None:
        await self._device_of(replica).add(replica)

    async def _remove(self, replica: str) -> None:
        await self._device_of(replica).remove(replica)

    async def _generate(self, attachment: Attachment, message: wire.Generate) -> None:
        device = self._device_of(message.replica)
        engine = device.engines[message.replica]
        if not engine.is_ready:  # it has begun to drain, or has died, while the request was under way
            raise Recalled
        request = wire.received(message, asyncio.get_running_loop().time())
        with metered(engine, request):
            device.controller.look()
            device.keeper.look()
            async with aclosing(engine.generate(request)) as chunks:
                async for chunk in chunks:
                    engine.usage.answered += chunk.finish is not None
                    attachment.say(wire.Streamed(message.number, chunk))

    async def _until_ready(self, replica: str) -> None:
        await self._device_of(replica).engines[replica].until_ready()

    def _count_waiting(self, replica: str, count: int) -> None:
        """Count requests that wait for a replica at the head, so that it wakes, or gets memory."""
        counted = self._waiting.setdefault(replica, [])
        if len(counted) == count:
            return
        device = self._device_of(replica)
        while len(counted) > count:
            counted.pop().close()
        while len(counted) < count:
            request = ExitStack()
            request.enter_context(device.engines[replica].usage.request(0))
            counted.append(request)
        device.keeper.look()

    def _on_state(self, replica: str, state: EngineState, seconds: float) -> None:
        self._say(wire.Entered(replica, state, seconds))

    def _publish(self, record: Record) -> None:
        self._say(wire.Recorded(decision_log.to_line(record)))

    async def _beat(self) -> None:
        while True:
            self._say(wire.Beat({name: self._report(device) for name, device in self._devices.items()}))
            await asyncio.sleep(BEAT_S)

    def _report(self, device: Device) -> wire.DeviceReport:
        controller, ledger, counts = device.controller, device.sharing.ledger, device.controller.counts
        silent = device.sharing.silent
        reactions_s = [*counts.reactions_s]
        counts.reactions_s.clear()
        return wire.DeviceReport(
            {name: _engine_report(engine, name in silent) for name, engine in device.engines.items()},
            ledger.budget_bytes,
            dict(ledger.held),
            device.sharing.reserved_bytes,
            wire.ControlCounts(
                counts.decisions,
                counts.faults,
                counts.resizes,
                counts.rejected,
                counts.moved_bytes,
                counts.preempted,
                reactions_s,
            ),
            controller.policy,
            controller.paused,
            dict(controller.pinned),
            dict(controller.unfit_pins),
            device.keeper.counts,
            device.keeper.policy,
            device.keeper.wait_of_job_s(),
        )

    async def _watch_head(self) -> None:
        """End the attachment of a silent head, unless the engines still start. End after `orphan_s` without one.

        While they start, there are no calls to cancel, and a head whose attachment ends cannot finish its start.
        """
        while True:
            await asyncio.sleep(BEAT_S)
            now_s = asyncio.get_running_loop().time()
            attachment = self._attachment
            assert attachment is not None
            if now_s - self._looked_s > HELD_UP_S:  # this process was held up, not the head
                attachment.heard_s = now_s
            self._looked_s = now_s
            silent_s = now_s - attachment.heard_s
            if self._started and silent_s > self._timeouts.lost_s and attachment.over is None:
                self._end(attachment, f"the head has said nothing to node {self.name} for {silent_s:.1f} s")
            if silent_s > self._timeouts.orphan_s:
                logging.getLogger(__name__).warning("the head has been silent for %.0f s; the agent ends", silent_s)
                self._closing = True
                asyncio.get_running_loop().call_soon(self._end_orphaned)
                return

    def _end_orphaned(self) -> None:
        self._ending = asyncio.create_task(self.close(), name="end")
        self._ending.add_done_callback(lambda task: self._on_orphaned())


MakeAgent = Callable[[str, Callable[[], None]], Agent]
"""Makes the agent of a node, given its name and what to call when it has ended without a head."""


async def start_engines(node: str, plan: Plan, owned: AsyncExitStack, on_state: OnState) -> Mapping[str, StartedFleet]:
    """Start the engines of a plan, which `owned` closes. Return the fleet of each device. Raises EngineError."""
    common, folder = plan.common, Path(plan.folder)
    for name, spec in common.specs.items():
        if spec.model.startswith("/") and not await asyncio.to_thread(Path(spec.model).is_dir):
            raise EngineError(f"node {node} has no folder {spec.model} (engines.{name}.model); copy the model to it")
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    processes = [spec for each in (plan.placed, plan.absent) for specs in each.values() for spec in specs.values()]
    launcher = owned.enter_context(Launcher(processes, folder))
    start = Start(folder, on_state, common.memory_bytes, common.kv_cache_bytes, common.host_bytes, common.may_sleep)
    return await start_placed(owned, launcher, start, plan.devices, plan.placed, plan.absent)


class _Reporter:
    """A callback that reports to the head that a replica's process has died."""

    def __init__(self, agent: Agent, replica: str) -> None:
        self._agent = agent
        self._replica = replica

    def __call__(self, death: Death) -> None:
        self._agent._say(wire.Died(self._replica, death))


def _engine_report(engine: EngineHandle, silent: bool) -> wire.EngineReport:
    try:
        return wire.EngineReport(engine.stats(), engine.limits, engine.asleep_bytes, silent, engine.is_ready)
    except EngineError:  # it has not started
        return wire.EngineReport(engine.stats(), None)


class _PushedForecast:
    """The head's forecast for a device, as ExpectedRequests and ExpectedTimes."""

    def __init__(self) -> None:
        self._expected = NOTHING
        self._at_s = 0.0

    def push(self, expected: wire.Expected) -> None:
        """Replace what is expected."""
        self._expected, self._at_s = expected, asyncio.get_running_loop().time()

    def open_calls(self) -> dict[str, int]:
        return dict(self._expected.open_calls)

    def soon(self, running: Mapping[str, float]) -> dict[str, float]:
        del running  # the head knows all replicas
        return dict(self._expected.soon)

    def coming(self) -> dict[str, float]:
        return dict(self._expected.coming)

    def next_call_s(self, absent: Collection[str] = ()) -> dict[str, float]:
        del absent
        age_s = asyncio.get_running_loop().time() - self._at_s
        return {name: max(seconds - age_s, 0.0) for name, seconds in self._expected.next_call_s.items()}

    def lead_s(self) -> dict[str, float]:
        return dict(self._expected.lead_s)
