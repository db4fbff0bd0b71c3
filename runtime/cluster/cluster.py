"""The head of a cluster: it places the engines on the devices of all nodes, and follows nodes that come and go."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from runtime.cluster import wire
from runtime.cluster.attachment import Refused
from runtime.cluster.link import AgentHandle, Link, Unreachable
from runtime.cluster.nodes import NODES_S, Node, Nodes
from runtime.cluster.plan import MEASURED, Attached, Common, Plan
from runtime.cluster.remote_device import RemoteDevice
from runtime.config import Config
from runtime.control import decision_log
from runtime.devices.placement import Placement, others, place
from runtime.devices.selection import select, sizes
from runtime.engines.fleet import Measured, OnState
from runtime.engines.handle import EngineState
from runtime.engines.replicas import device_of
from runtime.errors import ConfigError, Death, EngineError, TroupeError

WATCH_S = 0.5
"""Seconds between two looks for new, lost and returned nodes."""
ATTACH_S = 300.0
"""Timeout of an attachment to a new agent, in seconds. Its process has to start, which takes long on a busy machine."""
REATTACH_S = 5.0
"""Timeout of an attachment to an agent that runs already, in seconds."""
REPORT_S = 30.0
"""Timeout of the first report of an agent whose engines have started, in seconds."""
CLOSE_S = 30.0
"""Timeout of an agent's end, in seconds. It is killed after that."""
LOST_CLOSE_S = 1.0
"""Timeout of the end of a lost agent, in seconds."""
RETRY_MOST_S = 60.0
"""Longest pause before a node that could not be used is tried again, in seconds."""

OnWait = Callable[[int, int], None]
"""Called with the number of nodes that are there, and the number that the team waits for."""


class Cluster:
    """The agents of a cluster and their devices, as an async context manager that starts and stops them.

    Agents that already run the same engines, for a head that is gone, are taken over. Nodes that cannot be reached are
    tried again later. `on_device` is called with each device of a node that joins later. Entering raises ConfigError if
    the engines do not fit, and EngineError if one does not start, if an agent serves another head, or if no node can be
    reached.
    """

    def __init__(
        self,
        nodes: Nodes,
        config: Config,
        common: Common,
        folder: Path,
        on_state: OnState,
        on_wait: OnWait = lambda present, wanted: None,
    ) -> None:
        self.devices: dict[str, RemoteDevice] = {}
        self.on_device: Callable[[RemoteDevice], Awaitable[None]] | None = None
        self._nodes = nodes
        self._config = config
        self._common = common
        self._folder = folder
        self._on_state = on_state
        self._on_wait = on_wait
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
            with_agents = await self._nodes.with_agents()
            nodes = await self._nodes.alive() if with_agents else await self._first_nodes()
            if not nodes:
                raise ConfigError(
                    f"{self._config.source}: cluster: no node can run engines; start one, or change cluster.nodes_with"
                    "; with cluster.nodes, `ray status` says why the autoscaler starts none"
                )
            members = await self._reach_all(nodes)
            for member in members:
                self._known.update(member.attached.measured)
            await self._start([member for member in members if member.attached.fingerprint is None])
            for member in members:
                for device in await self._live_at_last(member):
                    self.devices[device.name] = device
            self._watching = asyncio.create_task(self._watch(), name="watch the nodes")
            owned.push_async_callback(_cancel, self._watching)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._owned.aclose()

    async def _first_nodes(self) -> list[Node]:
        """Return the nodes to start on. Wait for those that the cluster's autoscaler was asked for, if any."""
        nodes = await self._nodes.alive()
        wanted = (self._config.cluster and self._config.cluster.nodes) or 0
        until_s, seen = _now_s() + NODES_S, None
        while len(nodes) < wanted and _now_s() < until_s:
            if seen != len(nodes):
                self._on_wait(len(nodes), wanted)
            seen = len(nodes)
            await asyncio.sleep(WATCH_S)
            with suppress(EngineError):
                nodes = await self._nodes.alive()
        if len(nodes) < wanted:
            logging.getLogger(__name__).warning(
                "%s: cluster.nodes: the team starts with %d of %d nodes; see `ray status`",
                self._config.source,
                len(nodes),
                wanted,
            )
        return nodes

    def _member(self, node: Node) -> "_Member":
        member = self._members[node.name] = _Member(node, self._on_message, self._on_loss)
        return member

    async def _reach_all(self, nodes: Sequence[Node]) -> "list[_Member]":
        """Attach this head to all nodes that can be reached. Raise EngineError if there is none, or if one refuses."""
        members = [self._member(node) for node in nodes]
        reached = [self._reach(member, member.node) for member in members]
        results = await asyncio.gather(*reached, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        fatal = next((error for error in errors if not isinstance(error, NodeUnreachable)), None)
        if fatal is not None or len(errors) == len(nodes):
            raise fatal or errors[0]
        for error in errors:
            logging.getLogger(__name__).warning("%s; it is tried again later", error)
        return [member for member, result in zip(members, results, strict=True) if result is None]

    async def _reach(self, member: "_Member", node: Node) -> None:
        """Attach this head to the agent of a node. Replace an agent that runs something else.

        Retry for a while: an agent refuses this head until it notices that the old one is gone, and an agent needs a
        moment to end. Raises NodeUnreachable, and Refused if the agent serves another head. If this is cancelled, a new
        agent ends, because no head would end it.
        """
        until_s = _now_s() + 2 * self._common.timeouts.lost_s + 1
        while True:
            try:
                async with _reaching(node, REATTACH_S):
                    agent, created = await self._nodes.agent(node)
                async with _reaching(node, ATTACH_S if created else REATTACH_S):
                    try:
                        member.attached = await member.link.attach(agent, self._head)
                    except asyncio.CancelledError:
                        if created:
                            agent.kill()
                        raise
            except (Refused, NodeUnreachable):
                if _now_s() > until_s:
                    raise
                await asyncio.sleep(0.2)
                continue
            if member.attached.fingerprint in (None, self._common.fingerprint):
                break
            logging.getLogger(__name__).info("the agent of node %s runs something else; it is replaced", node.name)
            agent.kill()
            await asyncio.sleep(0.2)
        member.node, member.agent_or_none = node, agent
        member.link.begin(None)

    async def _start(self, fresh: "list[_Member]") -> None:
        """Start the engines on agents that run nothing yet: all engines, or none if other agents already run them."""
        numbers = {member.node.name: await self._numbers(member) for member in fresh}
        devices = {name: gpus for each in numbers.values() for name, gpus in each.items()}
        if self._known:
            placed: Placement = {name: {} for name in devices}
        else:
            placed = place(
                self._common.specs, [*devices], self._common.may_sleep, more_devices_come=True, gpus=sizes(devices)
            )
        plans = {
            member.node.name: self._plan(numbers[member.node.name], {n: placed[n] for n in numbers[member.node.name]})
            for member in fresh
        }

        async def start(member: _Member) -> None:
            async with _reaching(member.node):
                self._known.update(MEASURED.validate_json(await member.agent.start(plans[member.node.name])))

        async def control(member: _Member) -> None:
            async with _reaching(member.node):
                await member.agent.control(MEASURED.dump_json(self._known))

        await _all(*(start(member) for member in fresh))
        await _all(*(control(member) for member in fresh))

    async def _numbers(self, member: "_Member") -> dict[str, tuple[int, ...]]:
        """Return the numbers of the GPUs of a node's devices, by the names that they have in the cluster."""
        found = member.node.devices
        if found is None:
            async with _reaching(member.node):
                gpus = [] if self._config.devices == (0,) else await member.agent.gpus()
            found = select(self._config, gpus, self._common.specs)
        return {f"{member.node.prefix}{name}": numbers for name, numbers in found.items()}

    def _plan(self, numbers: Mapping[str, tuple[int, ...]], placed: Placement) -> bytes:
        absent = others(self._common.specs, placed, sizes(numbers))
        return Plan(self._common, numbers, placed, absent, str(self._folder)).to_json()

    async def _live_at_last(self, member: "_Member") -> list[RemoteDevice]:
        """Do as `_live`, and attach the agent again if it is lost before, as it may be on a busy machine.

        Raises NodeUnreachable if the agent has ended, or is lost again after REPORT_S.
        """
        until_s = _now_s() + REPORT_S
        while True:
            try:
                return await self._live(member)
            except NodeUnreachable:
                if _now_s() > until_s or member.node.name not in await self._nodes.with_agents():
                    raise
                await self._reach(member, member.node)
                if member.attached.fingerprint is None:  # it is a new one, without engines
                    raise

    async def _live(self, member: "_Member") -> list[RemoteDevice]:
        """Wait for the first report of an agent whose devices are controlled. Return those that are new.

        Raises NodeUnreachable if the agent is lost before.
        """
        member.reported.clear()
        member.link.begin(self._common.timeouts.lost_s)
        waits = [asyncio.ensure_future(event.wait()) for event in (member.reported, member.link.loss)]
        try:
            await asyncio.wait(waits, timeout=REPORT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not member.reported.is_set():
            raise NodeUnreachable(member.node, member.link.lost or "it reports nothing")
        for name in member.devices & set(self.devices):
            if name in member.reports:
                self.devices[name].controller.begin()
            else:
                self.devices[name].lose(gone=True)
        member.devices |= set(member.reports)
        return [
            RemoteDevice(name, member.link, report)
            for name, report in member.reports.items()
            if name not in self.devices
        ]

    def _on_message(self, member: "_Member", message: wire.FromAgent) -> None:
        match message:
            case wire.Beat():
                if message.devices:
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
                device = self.devices.get(device_of(message.replica))
                if device is not None and message.replica in device.engines:
                    device.engines[message.replica].on_death(message.death)
            case wire.Recorded():
                with suppress(ValidationError):  # of NaN, which JSON does not have
                    record = decision_log.from_line(message.record)
                    if record.device in self.devices:
                        self.devices[record.device].record(record)

    def _on_loss(self, member: "_Member") -> None:
        logging.getLogger(__name__).warning("node %s is lost: %s", member.node.name, member.link.lost)
        for name in member.devices & set(self.devices):
            self.devices[name].lose()
            for replica, engine in self.devices[name].engines.items():
                engine.on_death(Death.KILLED)
                self._on_state(replica, EngineState.LOST, _now_s() - self._began_s)

    async def _watch(self) -> None:
        """Attach nodes that are new, and those that were lost and are back."""
        complaint = ""
        while True:
            try:
                for node in await self._nodes.alive():
                    member = self._members.get(node.name)
                    wanted = member is None or (member.link.lost is not None and _now_s() >= member.retry_at_s)
                    if wanted and node.name not in self._joining:
                        task = asyncio.create_task(self._join(node), name=f"attach node {node.name}")
                        self._joining[node.name] = task
                        task.add_done_callback(partial(self._joined, node.name))
                complaint = ""
            except Exception as error:
                if str(error) != complaint:
                    complaint = str(error)
                    logging.getLogger(__name__).exception("the nodes cannot be listed")
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
            for device in await self._live(member):
                self.devices[device.name] = device
                if self.on_device is not None:
                    await self.on_device(device)
        except Exception as error:
            if not isinstance(error, TroupeError):
                logging.getLogger(__name__).exception("node %s cannot be attached", node.name)
            member.link.drop()
            member.failed()
            if (text := str(error)) != member.complaint:
                member.complaint = text
                logging.getLogger(__name__).warning("node %s cannot be used yet: %s", node.name, text)
            return
        member.complaint, member.pause_s = "", 0.0
        logging.getLogger(__name__).info("node %s is used", node.name)
        for name in member.reports:
            for replica, engine in self.devices[name].engines.items():
                self._on_state(replica, engine.state, _now_s() - self._began_s)

    async def _close(self) -> None:
        """Let all agents stop their engines and end."""
        joining = [*self._joining.values()]
        for task in joining:
            task.cancel()
        if joining:
            await asyncio.wait(joining)

        async def close(member: _Member) -> None:
            agent = member.agent_or_none
            was_lost = member.link.lost is not None
            member.link.expect_end()
            if agent is not None:
                with suppress(Unreachable, TimeoutError, EngineError):
                    async with asyncio.timeout(LOST_CLOSE_S if was_lost else CLOSE_S):
                        await agent.close()
                agent.kill()
            await member.link.close()

        await asyncio.gather(*(close(member) for member in self._members.values()))


class NodeUnreachable(EngineError):
    """The agent of a node does not answer or is gone."""

    def __init__(self, node: Node, why: str) -> None:
        super().__init__(
            f"node {node.name} cannot be reached: {why or 'no answer'}; see whether it is up (`ray status`), and its "
            "logs of Ray"
        )


@asynccontextmanager
async def _reaching(node: Node, timeout_s: float | None = None) -> AsyncIterator[None]:
    """Raise NodeUnreachable if the agent that the block calls is gone, or does not answer in time."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (Unreachable, TimeoutError) as error:
        raise NodeUnreachable(node, str(error)) from None


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
        self.attached = Attached(0)
        self.devices: set[str] = set()
        self.reports: Mapping[str, wire.DeviceReport] = {}
        self.reported = asyncio.Event()
        self.complaint = ""
        self.pause_s = 0.0
        self.retry_at_s = 0.0

    @property
    def agent(self) -> AgentHandle:
        """The agent of the node, which serves this head or did until it was lost."""
        assert self.agent_or_none is not None
        return self.agent_or_none

    def failed(self) -> None:
        """Wait longer after each failure before the node is tried again."""
        self.pause_s = min(2 * self.pause_s + WATCH_S, RETRY_MOST_S)
        self.retry_at_s = _now_s() + self.pause_s


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
