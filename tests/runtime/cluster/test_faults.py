"""What goes wrong between a head and its agents at the worst moment, over modelled engines."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.role import Message
from runtime import config
from runtime.cluster import wire
from runtime.cluster.agent import Agent
from runtime.cluster.attachment import Refused
from runtime.cluster.cluster import Cluster
from runtime.cluster.link import Unreachable
from runtime.cluster.nodes import Node
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.spec import ReplicaRange
from runtime.engines.supervised import SupervisedEngine
from runtime.engines.usage import Held
from runtime.errors import EngineError, RequestQuarantined
from runtime.simulation.assembly import right_reply
from runtime.simulation.modelled_agent import modelled_agent
from tests.runtime.cluster.nodes import LocalAgent, LocalNodes
from tests.runtime.cluster.test_cluster import SLOW, assert_right, cluster, ready, running, until, work

virtual = pytest.mark.virtual_time
REQUEST = GenerateRequest("r", (Message("user", "one two three four five"),), 0.0, 1.0, 8)


class TwoDevices(LocalNodes):
    """Nodes with the devices in `numbers`, by name."""

    numbers: dict[str, tuple[int, ...]] = {"0": (0,), "1": (1,)}  # noqa: RUF012  a test changes it on its own instance

    async def alive(self) -> list[Node]:
        return [Node(name, name, f"{name}:", self.numbers) for name in self.names]


class DiesOnce(LocalAgent):
    """An agent whose process ends once, before or after it controls its devices."""

    def __init__(self, agent: Agent, before: bool) -> None:
        super().__init__(agent)
        self._before = before

    async def control(self, known: bytes) -> None:
        if self._before:
            self.kill()
            raise Unreachable("the process is gone")
        await super().control(known)
        self.kill()


class HearsLate(LocalAgent):
    """An agent that hears nothing of the head for `seconds`, while its engines start within 3 s."""

    def __init__(self, agent: Agent, seconds: float) -> None:
        super().__init__(agent)
        self._hears_s = asyncio.get_running_loop().time() + seconds

    async def start(self, plan: bytes) -> bytes:
        await asyncio.sleep(3)
        return await super().start(plan)

    def take(self, epoch: int, number: int, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(max(self._hears_s - loop.time(), 0), super().take, epoch, number, data)


async def collect(stream: AsyncGenerator[Chunk, None]) -> list[Chunk]:
    return [chunk async for chunk in stream]


def hold_up(made: Cluster, node: str) -> Callable[[], None]:
    """Let no message of the head reach an agent until the returned function is called, which delivers them."""
    agent: Any = made._members[node].link._agent
    real, held = agent.take, []
    agent.take = lambda *message: held.append(message)

    def release() -> None:
        agent.take = real
        for message in held:
            real(*message)

    return release


def starts_slowly(engine: EngineHandle, seconds: float = 20) -> None:
    assert isinstance(engine, SupervisedEngine)
    make = engine._make

    def slow(grant: Any) -> EngineHandle:
        made = make(grant)
        start = made.start

        async def start_slowly() -> None:
            await asyncio.sleep(seconds)
            await start()

        made.start = start_slowly  # type: ignore[method-assign]
        return made

    engine._make = slow


def vanish(made: Cluster) -> None:
    """Let a head say nothing any more, as after kill -9."""
    made._watching.cancel()
    for member in made._members.values():
        member.link._cancel()
        member.link._send = lambda messages: None  # type: ignore[method-assign]
    made._owned.pop_all()


@virtual
@pytest.mark.parametrize("seconds", [0.8, 1.5])
async def test_a_head_that_was_held_up_loses_no_job(tmp_path: Path, seconds: float) -> None:
    nodes = LocalNodes("a", make=SLOW)
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        working = asyncio.create_task(work(team, 20, 20))
        await until(lambda: team.engines["solver@a:0"].usage.in_flight > 5)
        release = hold_up(made, "a")
        await asyncio.sleep(seconds)
        release()
        async with asyncio.timeout(3000):
            assert_right(await working, 20)


@virtual
async def test_a_message_that_is_lost_costs_no_call(tmp_path: Path) -> None:
    nodes = LocalNodes("a", make=SLOW)
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        agent: Any = made._members["a"].link._agent
        take, agent.take = agent.take, lambda *message: None
        await asyncio.sleep(0.3)
        agent.take = take
        async with asyncio.timeout(100):
            assert (await collect(team.generate("solver", REQUEST)))[-1].finish == "stop"


@virtual
async def test_a_message_that_cannot_be_carried_out_costs_no_call(tmp_path: Path) -> None:
    async with cluster(LocalNodes("a"), tmp_path) as made, running(made) as team:
        made._members["a"].link.post(wire.Pause("gone:0", True))
        async with asyncio.timeout(100):
            assert (await collect(team.engines["solver@a:0"].generate(REQUEST)))[-1].finish == "stop"


@virtual
async def test_a_replica_that_starts_when_its_node_is_lost_starts_all_the_same(tmp_path: Path) -> None:
    nodes = LocalNodes("a")
    async with cluster(nodes, tmp_path, {"solver": ReplicaRange(min=1, max=2)}) as made, running(made) as team:
        nodes.names.append("b")
        await until(lambda: "b:0" in team.devices)
        on_agent = nodes.agents["b"].agent._devices["b:0"]
        starts_slowly(on_agent.engines["solver@b:0"])
        adding = asyncio.create_task(team.devices["b:0"].add("solver@b:0"))
        await until(lambda: on_agent.engines["solver@b:0"].state is EngineState.WAKING)
        nodes.agents["b"].thawed.clear()
        await until(lambda: team.devices["b:0"].lost)
        nodes.agents["b"].thawed.set()
        with pytest.raises(EngineError, match="node b is lost"):
            await adding
        await until(lambda: team.engines["solver@b:0"].state is EngineState.READY)


@virtual
async def test_a_request_that_crosses_a_removal_goes_to_another_replica(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b")
    async with cluster(nodes, tmp_path, {"solver": 2}) as made, running(made) as team:
        assert team.rebalancer._task is not None
        team.rebalancer._task.cancel()
        team._replicas["solver"].choose = lambda ready, home: min(ready, key=lambda replica: replica.name)
        nodes.agents["a"].thawed.clear()
        await nodes.agents["a"].agent._devices["a:0"].remove("solver@a:0")
        call = asyncio.create_task(collect(team.generate("solver", REQUEST)))
        await asyncio.sleep(0.05)
        nodes.agents["a"].thawed.set()
        assert (await call)[-1].finish == "stop"
        assert team.engines["solver@b:0"].usage.finished == 1


@virtual
async def test_a_head_returns_while_one_node_does_not_answer(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b")
    async with cluster(nodes, tmp_path, {"solver": 2}) as dead, running(dead):
        vanish(dead)
        nodes.agents["b"].thawed.clear()
        async with cluster(nodes, tmp_path, {"solver": 2}) as made, running(made) as team:
            assert not nodes.agents["a"].dead.is_set()
            assert ready(team, "solver") == {"a:0"}
            nodes.agents["b"].thawed.set()
            await until(lambda: ready(team, "solver") == {"a:0", "b:0"})


@virtual
async def test_what_a_dead_head_expected_is_forgotten(tmp_path: Path) -> None:
    nodes = LocalNodes("a", make=SLOW)
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        working = asyncio.create_task(work(team, 50))
        await until(lambda: team.engines["solver@a:0"].usage.in_flight > 10)
        agent = nodes.agents["a"].agent
        vanish(made)
        await asyncio.sleep(10)
        assert not any(agent._expected["a:0"].open_calls().values())
        assert [engine.usage.in_flight for engine in agent._devices["a:0"].engines.values()] == [0, 0, 0]
        working.cancel()
        await agent.close()


@virtual
async def test_decisions_belong_to_their_devices(tmp_path: Path) -> None:
    async with cluster(TwoDevices("a"), tmp_path, {"solver": 2}) as made, running(made) as team:
        await work(team, 20)
        assert {name: "solver@" + name in each.engines for name, each in team.controllers.snapshots.items()} == {
            "a:0": True,
            "a:1": True,
        }


@virtual
async def test_a_device_that_is_gone_after_a_restart_is_lost(tmp_path: Path) -> None:
    nodes = TwoDevices("a")
    replicas = dict.fromkeys(("planner", "solver", "critic"), 2)
    async with cluster(nodes, tmp_path, replicas) as made, running(made) as team:
        nodes.numbers = {"0": (0,)}
        nodes.agents["a"].kill()
        await until(lambda: ready(team, "solver") == {"a:0"})
        assert team.devices["a:1"].lost
        assert team.engines["solver@a:1"].state is EngineState.LOST
        assert_right(await work(team, 20), 20)


@virtual
async def test_changes_reach_a_node_that_was_lost_and_one_that_is_new(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        nodes.agents["b"].thawed.clear()
        await until(lambda: team.devices["b:0"].lost)
        team.controllers.use(config.PolicyChoice(name="static"))
        team.controllers.pause()
        nodes.agents["b"].thawed.set()
        nodes.names.append("c")
        await until(lambda: not team.devices["b:0"].lost and "c:0" in team.devices)
        await asyncio.sleep(1)
        for node in "abc":
            controller = nodes.agents[node].agent._devices[f"{node}:0"].controller
            assert (controller.policy, controller.paused) == ("static", True), node


@virtual
async def test_a_waiting_request_counts_once_at_one_agent(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b")
    async with cluster(nodes, tmp_path, {"solver": 2}) as made, running(made) as team:
        assert team.rebalancer._task is not None
        team.rebalancer._task.cancel()
        devices = [nodes.agents[node].agent._devices[f"{node}:0"] for node in "ab"]
        engines: list[Any] = [device.engines[f"solver@{device.name}"] for device in devices]
        for engine in engines:
            engine._ready.clear()
            engine._enter_rest(EngineState.WAKING)
        await asyncio.sleep(0.5)
        call = asyncio.create_task(collect(team.generate("solver", REQUEST)))
        await asyncio.sleep(30)
        assert sum(engine.usage.arrived for engine in engines) == 1
        assert sum(engine.usage.in_flight for engine in engines) == 1
        call.cancel()
        await asyncio.sleep(1)
        assert sum(engine.usage.in_flight for engine in engines) == 0


@virtual
async def test_a_lost_engine_is_charged_for_nothing(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        (where,) = ready(team, "solver")
        engine = team.engines[f"solver@{where}"]
        nodes.agents[where[0]].kill()
        nodes.names.remove(where[0])
        await until(lambda: team.devices[where].lost)
        before = engine.usage.spent()[Held.RESIDENT].byte_seconds
        await asyncio.sleep(100)
        assert engine.usage.spent()[Held.RESIDENT].byte_seconds == before
        assert engine.held_bytes == 0


@virtual
@pytest.mark.parametrize("before", [True, False])
async def test_an_agent_that_dies_while_it_starts_is_named(tmp_path: Path, before: bool) -> None:
    nodes = LocalNodes("a")
    nodes.agents["a"] = DiesOnce(modelled_agent("a"), before)
    with pytest.raises(EngineError, match=r"node a cannot be reached: .*ray status"):
        async with cluster(nodes, tmp_path):
            pass


@virtual
@pytest.mark.parametrize("seconds", [2, 8])
async def test_a_head_that_is_held_up_while_engines_start_starts_all_the_same(tmp_path: Path, seconds: float) -> None:
    nodes = LocalNodes("a", "b")
    nodes.agents["a"] = HearsLate(modelled_agent("a"), seconds)
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        assert set(made.devices) == {"a:0", "b:0"}
        assert_right(await work(team, 20), 20)


class NeverAttaches(LocalAgent):
    """An agent that is still importing its modules."""

    async def attach(self, head: str, wire_version: int) -> bytes:
        await asyncio.sleep(1e6)
        return b""


class Attaching(LocalNodes):
    """Nodes of which all but the first have agents that never attach."""

    def new_agent(self, agent: Agent) -> LocalAgent:
        return NeverAttaches(agent) if self.agents else LocalAgent(agent)


@virtual
async def test_leaving_ends_an_agent_that_has_not_been_attached_yet(tmp_path: Path) -> None:
    nodes = Attaching("a")
    async with cluster(nodes, tmp_path):
        nodes.names.append("b")
        await until(lambda: "b" in nodes.agents)
        await asyncio.sleep(10)
        assert not nodes.agents["b"].dead.is_set()
    assert nodes.agents["b"].dead.is_set()


@virtual
async def test_a_node_whose_engines_cannot_start_is_tried_less_and_less_often(tmp_path: Path) -> None:
    starts = 0

    async def fail(*arguments: Any) -> Any:
        nonlocal starts
        starts += 1
        raise EngineError("node b has no folder /models/x (engines.solver.model); copy the model to it")

    nodes = LocalNodes("a")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        nodes._make = lambda name: Agent(name, start=fail)
        nodes.names.append("b")
        await asyncio.sleep(60)
        assert 3 < starts < 10
        assert "b:0" not in team.devices
        assert_right(await work(team, 10), 10)


@virtual
async def test_listing_the_nodes_may_fail_for_a_while(tmp_path: Path) -> None:
    nodes = LocalNodes("a")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        alive = nodes.alive

        async def fail() -> list[Node]:
            raise RuntimeError("the cluster does not answer")

        nodes.alive = fail  # type: ignore[method-assign]
        await asyncio.sleep(5)
        nodes.names.append("b")
        nodes.alive = alive  # type: ignore[method-assign]
        await until(lambda: "b:0" in team.devices)


@virtual
async def test_an_agent_that_ends_takes_no_head() -> None:
    agent = modelled_agent("a")
    await agent.attach("first", wire.VERSION)
    await agent.close()
    with pytest.raises(Refused, match="is ending"):
        await agent.attach("second", wire.VERSION)


@virtual
async def test_a_head_with_other_messages_is_refused() -> None:
    with pytest.raises(Refused, match="install the same Troupe on both"):
        await modelled_agent("a").attach("new", wire.VERSION + 1)


@virtual
async def test_leaving_does_not_wait_for_a_frozen_node(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        nodes.agents["b"].thawed.clear()
        await until(lambda: team.devices["b:0"].lost)
        began_s = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began_s < 3
    assert all(agent.dead.is_set() for agent in nodes.agents.values())


@virtual
async def test_a_reply_that_is_complete_when_its_agent_is_lost_is_not_replayed(tmp_path: Path) -> None:
    nodes = LocalNodes("a")
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        chunks = []
        async for chunk in team.generate("solver", REQUEST):
            chunks.append(chunk)
            if chunk.finish:
                nodes.agents["a"].kill()
                await until(lambda: team.devices["a:0"].lost)
        assert [chunk.finish for chunk in chunks if chunk.finish] == ["stop"]


@virtual
async def test_a_request_that_ends_agents_is_refused_and_its_bystanders_are_served(tmp_path: Path) -> None:
    poison = replace(REQUEST, messages=(Message("user", "poison"),))

    def make(name: str) -> Agent:
        def script(request: GenerateRequest) -> str:
            if request.messages == poison.messages:
                nodes.agents[name].kill()
            return right_reply(request)

        return modelled_agent(name, time_scale=20, script=script)

    nodes = LocalNodes("a", "b", make=make)
    async with cluster(nodes, tmp_path, {"solver": 2}) as made, running(made) as team:
        others = [asyncio.create_task(collect(team.generate("solver", REQUEST))) for _ in range(10)]
        await until(lambda: team.engines["solver@a:0"].stats().running > 0)
        async with asyncio.timeout(200):
            with pytest.raises(RequestQuarantined, match="engine solver was killed while it had only this request"):
                await collect(team.generate("solver", poison))
            assert {(await other)[-1].finish for other in others} == {"stop"}


@virtual
async def test_poison_uses_up_no_restarts_of_an_agents_engine(tmp_path: Path) -> None:
    poison = replace(REQUEST, messages=(Message("user", "poison"),))

    def script(request: GenerateRequest) -> str:
        if request.messages == poison.messages:
            supervised: Any = on_agent()
            supervised._engine.crash()
        return right_reply(request)

    def on_agent() -> EngineHandle:
        return nodes.agents["a"].agent._devices["a:0"].engines["solver@a:0"]

    nodes = LocalNodes("a", make=lambda name: modelled_agent(name, script=script))
    async with cluster(nodes, tmp_path) as made, running(made) as team:
        for _ in range(8):
            with pytest.raises(RequestQuarantined, match="engine solver crashed"):
                await collect(team.generate("solver", poison))
        assert (await collect(team.generate("solver", REQUEST)))[-1].finish == "stop"
        assert on_agent().state is EngineState.READY


@virtual
async def test_a_request_survives_the_loss_of_three_nodes(tmp_path: Path) -> None:
    nodes = LocalNodes("a", "b", make=SLOW)
    async with cluster(nodes, tmp_path, {"solver": 2}) as made, running(made) as team:
        call = asyncio.create_task(collect(team.generate("solver", REQUEST)))
        for _ in range(3):
            await until(lambda: any(team.engines[f"solver@{node}:0"].stats().running for node in "ab"))
            [node] = [node for node in "ab" if team.engines[f"solver@{node}:0"].stats().running]
            nodes.agents[node].kill()
            await until(lambda node=node: team.devices[f"{node}:0"].lost)  # type: ignore[misc]
        assert (await call)[-1].finish == "stop"


async def test_a_second_head_is_refused_by_an_agent_that_was_held_up() -> None:
    agent = modelled_agent("a")
    await agent.attach("first", wire.VERSION)
    for number in range(4):
        await agent.take(1, number, wire.encode([wire.Expect({})]))
        await asyncio.sleep(0.1)
    second = asyncio.ensure_future(agent.attach("second", wire.VERSION))
    time.sleep(1.5)  # noqa: ASYNC251  the second head is read before the messages of the first
    with pytest.raises(Refused):
        await second
    await agent.take(1, 4, wire.encode([wire.Expect({})]))
    await agent.close()
