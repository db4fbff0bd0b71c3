"""Nodes whose agents run in the process of the test. They can be killed, frozen and thawed, as real ones."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from runtime.cluster.agent import Agent
from runtime.cluster.link import AgentHandle, Unreachable
from runtime.cluster.nodes import Node
from runtime.errors import EngineError
from runtime.simulation.modelled_agent import modelled_agent


class LocalAgent:
    """An AgentHandle of an agent in this process. Everything that it says and hears crosses as bytes."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.dead = asyncio.Event()
        self.thawed = asyncio.Event()
        self.thawed.set()

    async def _pass(self) -> None:
        """Wait while the agent is frozen. Raise Unreachable if it is dead."""
        await self.thawed.wait()
        if self.dead.is_set():
            raise Unreachable("the process is gone")

    async def attach(self, head: str, wire_version: int) -> bytes:
        await self._pass()
        return await self.agent.attach(head, wire_version)

    async def gpus(self) -> list[int]:
        return []

    async def start(self, plan: bytes) -> bytes:
        await self._pass()
        return await self.agent.start(plan)

    async def control(self, known: bytes) -> None:
        await self._pass()
        await self.agent.control(known)

    async def outbox(self, epoch: int) -> AsyncIterator[bytes]:
        async for data in self.agent.outbox(epoch):
            await self._pass()
            yield data
        await self._pass()

    def take(self, epoch: int, number: int, data: bytes) -> None:
        task = asyncio.create_task(self._take(epoch, number, data))
        self._taking = {*getattr(self, "_taking", ()), task}

    async def _take(self, epoch: int, number: int, data: bytes) -> None:
        with suppress(Unreachable):
            await self._pass()
            await self.agent.take(epoch, number, data)

    async def close(self) -> None:
        await self._pass()
        await self.agent.close()

    def kill(self) -> None:
        """End the process. Its engines end with it."""
        if not self.dead.is_set():
            self.dead.set()
            self.thawed.set()
            self.ending = asyncio.create_task(self.agent.close())


class LocalNodes:
    """The nodes of a cluster. `names` are those that are alive."""

    def __init__(self, *names: str, make: Callable[[str], Agent] = modelled_agent) -> None:
        self.names = [*names]
        self.agents: dict[str, LocalAgent] = {}
        self._make = make

    async def alive(self) -> list[Node]:
        return [Node(name, name, f"{name}:") for name in self.names]

    async def with_agents(self) -> set[str]:
        return {name for name, agent in self.agents.items() if not agent.dead.is_set()}

    async def agent(self, node: Node) -> tuple[AgentHandle, bool]:
        if node.name not in self.names:
            raise EngineError(f"the agent of node {node.name} cannot be started: the node is gone")
        created = node.name not in self.agents or self.agents[node.name].dead.is_set()
        if created:
            self.agents[node.name] = self.new_agent(self._make(node.name))
        return self.agents[node.name], created

    def new_agent(self, agent: Agent) -> LocalAgent:
        return LocalAgent(agent)
