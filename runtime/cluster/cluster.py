"""The head of a cluster: it places the engines on the devices of all nodes, and follows nodes that come and go."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Self

from runtime.cluster import wire
from runtime.cluster.link import AgentHandle, Link, Unreachable
from runtime.cluster.nodes import Node, Nodes
from runtime.cluster.plan import MEASURED, Attached, Common, Plan
from runtime.cluster.remote_device import RemoteDevice
from runtime.config import Config
from runtime.devices.placement import Placement, others, place
from runtime.devices.selection import select
from runtime.engines.fleet import Measured, OnState
from runtime.engines.handle import EngineState
from runtime.engines.replicas import device_of
from runtime.errors import ConfigError, EngineError, TroupeError

WATCH_S = 0.5
"""The head looks for new, lost and returned nodes so often."""
ATTACH_S = 5.0
"""An agent that does not answer for so long is not reached."""
REPORT_S = 30.0
"""An agent whose engines have started reports within so many seconds."""
CLOSE_S = 30.0
"""An agent that has not stopped its engines within so many seconds is killed."""


class Cluster:
    """The agents of a cluster and their devices, as an async context manager that starts and stops them.

    Agents that already run the same engines, for a head that is gone, are taken over. `on_device` is called with each
    device of a node that joins later. Entering raises ConfigError if the engines do not fit, and EngineError if one
    does not start or if an agent serves another head.
    """

    def __init__(self, nodes: Nodes, config: Config, common: Common, folder: Path, on_state: OnState) -> None:
        self.devices: dict[str, RemoteDevice] = {}
        self.on_device: Callable[[RemoteDevice], Awaitable[None]] | None = None
        self._nodes = nodes
        self._config = config
        self._common = common
        self._folder = folder
        self._on_state = on_state
        self._head = f"{socket.gethostname()}, process {os.getpid()} ({secrets.token_hex(3)})"
        self._members: dict[str, _Member] = {}
        self._known: dict[str, Measured] = {}
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._began_s = 0.0
        self._owned = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._began_s = _now_s()
        async with AsyncExitStack() as owned:
            owned.push_async_callback(self._close)
            nodes = await self._nodes.alive()
            if not nodes:
                raise ConfigError(
                    f"{self._config.source}: cluster: no node can run engines; start one, or change cluster.nodes_with"
                )
            members = [self._member(node) for node in nodes]
            await _all(*(self._reach(member, node) for member, node in zip(members, nodes, strict=True)))
            for member in members:
                self._known.update(member.attached.measured)
            await self._start([member for member in members if member.attached.fingerprint is None])
            for member in members:
                self.devices.update(await self._live(member))
            self._watching = asyncio.create_task(self._watch(), name="watch the nodes")
            owned.push_async_callback(_cancel, self._watching)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._owned.aclose()

    def _member(self, node: Node) -> "_Member":
        member = self._members[node.name] = _Member(node, self._on_message, self._on_loss)
        return member

    async def _reach(self, member: "_Member", node: Node) -> None:
        """Attach this head to the agent of a node. Replace an agent that runs something else.

        An agent serves a head that is gone until it notices that, so that this is tried for a while.
        """
        until_s = _now_s() + 2 * self._common.limits.lost_s + 1
        while True:
            member.agent = await self._nodes.agent(node)
            try:
                async with asyncio.timeout(ATTACH_S if self.devices else 60):  # an agent imports for some seconds
                    member.attached = await member.link.attach(member.agent, self._head)
            except EngineError:
                if _now_s() > until_s:
                    raise
                await asyncio.sleep(0.2)
                continue
            except (Unreachable, TimeoutError) as error:
                raise EngineError(f"node {node.name} cannot be reached: {str(error) or 'no answer'}") from None
            if member.attached.fingerprint in (None, self._common.fingerprint):
                break
            logging.getLogger(__name__).info("the agent of node %s runs something else; it is replaced", node.name)
            member.agent.kill()
            await asyncio.sleep(0.2)
        member.node = node
        member.link.begin(None)

    async def _start(self, fresh: "list[_Member]") -> None:
        """Start the engines on agents that run nothing yet: all engines, or none if other agents already run them."""
        numbers = {member.node.name: await self._numbers(member) for member in fresh}
        names = [name for each in numbers.values() for name in each]
        if self._known:
            placed: Placement = {name: {} for name in names}
        else:
            placed = place(self._common.specs, names, self._common.may_sleep, more_devices_come=True)
        plans = {
            member.node.name: self._plan(numbers[member.node.name], {n: placed[n] for n in numbers[member.node.name]})
            for member in fresh
        }

        async def start(member: _Member) -> None:
            try:
                self._known.update(MEASURED.validate_json(await member.agent.start(plans[member.node.name])))
            except Unreachable as error:
                raise EngineError(f"node {member.node.name} is lost: {error}") from None

        await _all(*(start(member) for member in fresh))
        known = MEASURED.dump_json(self._known)
        await _all(*(member.agent.control(known) for member in fresh))

    async def _numbers(self, member: "_Member") -> dict[str, int | None]:
        """Return the numbers of a node's devices, by the names that they have in the cluster."""
        found = member.node.devices
        if found is None:
            gpus = [] if self._config.devices == (0,) else await member.agent.gpus()
            found = select(self._config, gpus)
        return {f"{member.node.prefix}{name}": number for name, number in found.items()}

    def _plan(self, numbers: Mapping[str, int | None], placed: Placement) -> bytes:
        return Plan(self._common, numbers, placed, others(self._common.specs, placed), str(self._folder)).to_json()

    async def _live(self, member: "_Member") -> dict[str, RemoteDevice]:
        """Wait for the first report of an agent whose devices are controlled. Return those that are new."""
        member.link.begin(self._common.limits.lost_s)
        member.reported.clear()
        async with asyncio.timeout(REPORT_S):
            await member.reported.wait()
        new = {}
        for name, report in member.reports.items():
            if name not in self.devices:
                new[name] = RemoteDevice(name, member.link, report)
        return new

    def _on_message(self, member: "_Member", message: wire.FromAgent) -> None:
        match message:
            case wire.Beat():
                member.reports = message.devices
                for name, report in message.devices.items():
                    if name in self.devices:
                        self.devices[name].update(report)
                if message.devices:
                    member.reported.set()
            case wire.Entered():
                device = self.devices.get(device_of(message.replica))
                if device is not None and message.replica in device.engines:
                    device.engines[message.replica].enter(message.state)
                self._on_state(message.replica, message.state, message.seconds)
            case wire.Died():
                if device := self.devices.get(device_of(message.replica)):
                    device.engines[message.replica].on_death(message.death)
            case wire.Recorded():
                for device in self.devices.values():
                    if device.name in member.reports:
                        device.record(message.record)
                        break

    def _on_loss(self, member: "_Member") -> None:
        logging.getLogger(__name__).warning("node %s is lost: %s", member.node.name, member.link.lost)
        for name in member.reports:
            if name in self.devices:
                for replica in self.devices[name].engines:
                    self._on_state(replica, EngineState.LOST, _now_s() - self._began_s)

    async def _watch(self) -> None:
        """Attach nodes that are new, and those that were lost and are back."""
        while True:
            try:
                for node in await self._nodes.alive():
                    member = self._members.get(node.name)
                    if (member is None or member.link.lost is not None) and node.name not in self._joining:
                        task = asyncio.create_task(self._join(node), name=f"attach node {node.name}")
                        self._joining[node.name] = task
                        task.add_done_callback(partial(self._joined, node.name))
            except TroupeError as error:
                logging.getLogger(__name__).warning("the nodes cannot be listed: %s", error)
            await asyncio.sleep(WATCH_S)

    def _joined(self, name: str, task: asyncio.Task[None]) -> None:
        del self._joining[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            logging.getLogger(__name__).error("node %s cannot be attached", name, exc_info=error)

    async def _join(self, node: Node) -> None:
        """Attach a node, new or returned. An agent without engines gets absent replicas, which the placement starts."""
        member = self._members.get(node.name) or self._member(node)
        try:
            await self._reach(member, node)
            if member.attached.fingerprint is None:
                await self._start([member])
            for name, device in (await self._live(member)).items():
                self.devices[name] = device
                if self.on_device is not None:
                    await self.on_device(device)
        except (TroupeError, TimeoutError, Unreachable) as error:
            member.link.drop()
            if (text := str(error)) != member.complaint:
                member.complaint = text
                logging.getLogger(__name__).warning("node %s cannot be used yet: %s", node.name, text or "no answer")
            return
        member.complaint = ""
        logging.getLogger(__name__).info("node %s is used", node.name)
        for name in member.reports:
            for replica, engine in self.devices[name].engines.items():
                self._on_state(replica, engine.state, _now_s() - self._began_s)

    async def _close(self) -> None:
        """Let all agents stop their engines and end."""
        for task in self._joining.values():
            task.cancel()

        async def close(member: _Member) -> None:
            agent = member.agent_or_none
            if agent is not None:
                with suppress(Unreachable, TimeoutError, EngineError):
                    async with asyncio.timeout(CLOSE_S):
                        await agent.close()
                agent.kill()
            await member.link.close()

        await asyncio.gather(*(close(member) for member in self._members.values()))


class _Member:
    """A node of the cluster as the head knows it: its agent, the link to it, and what it reported last."""

    def __init__(
        self,
        node: Node,
        on_message: "Callable[[_Member, wire.FromAgent], None]",
        on_loss: "Callable[[_Member], None]",
    ) -> None:
        self.node = node
        self.link = Link(node.name, lambda message: on_message(self, message), lambda: on_loss(self))
        self.agent_or_none: AgentHandle | None = None
        self.attached = Attached(0, wire.VERSION, "")
        self.reports: Mapping[str, wire.DeviceReport] = {}
        self.reported = asyncio.Event()
        self.complaint = ""

    @property
    def agent(self) -> AgentHandle:
        """The agent that runs on the node."""
        assert self.agent_or_none is not None
        return self.agent_or_none

    @agent.setter
    def agent(self, agent: AgentHandle) -> None:
        self.agent_or_none = agent


async def _all(*work: Awaitable[None]) -> None:
    """Do all of it at the same time. If one fails, cancel the others and raise its error."""

    async def done(one: Awaitable[None]) -> None:
        await one

    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(done(one))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
