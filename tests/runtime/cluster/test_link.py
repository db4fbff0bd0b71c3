"""The head's link to one agent, whose side is scripted: its pulse, its beat, and calls that end oddly."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from runtime.cluster import wire
from runtime.cluster.attachment import Attachment
from runtime.cluster.link import Link
from runtime.cluster.plan import Attached
from runtime.cluster.remote_engine import RemoteEngine
from runtime.engines.fake import FakeEngine
from runtime.engines.handle import EngineState, Recalled
from runtime.errors import EngineDead
from runtime.simulation.modelled_agent import modelled_agent
from tests.runtime.cluster.test_cluster import until
from tests.runtime.cluster.test_faults import REQUEST


class Scripted:
    """An AgentHandle that says what is put into `items`, and beats."""

    def __init__(self, pulse: tuple[str, int] | None = None) -> None:
        self.items: list[wire.FromAgent] = []
        self.heard: list[wire.ToAgent] = []
        self._pulse = pulse

    async def attach(self, head: str, wire_version: int) -> bytes:
        return Attached(1, pulse=self._pulse).to_json()

    async def outbox(self, epoch: int) -> AsyncIterator[bytes]:
        while True:
            items, self.items = self.items, []
            yield wire.encode([*items, wire.Beat({})])
            await asyncio.sleep(0.02)

    def take(self, epoch: int, number: int, data: bytes) -> None:
        self.heard += wire.to_agent.decode(data)

    async def gpus(self) -> list[int]:
        return []

    async def start(self, plan: bytes) -> bytes:
        raise NotImplementedError

    async def control(self, known: bytes) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        pass

    def kill(self) -> None:
        pass


async def linked(agent: Scripted) -> Link:
    link = Link("a", lambda message: None, lambda: None)
    await link.attach(agent, "head")
    link.begin(30)
    return link


async def test_an_agent_whose_pulse_ends_is_lost_at_once() -> None:
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda reader, writer: held.append(writer), "127.0.0.1", 0)
    link = await linked(Scripted(server.sockets[0].getsockname()[:2]))
    await until(lambda: bool(held))
    assert link.lost is None
    server.close()
    held[0].close()
    async with asyncio.timeout(10):
        await link.loss.wait()
    assert link.lost == "its process has ended"
    await link.close()


async def test_a_proxy_that_closes_the_pulse_is_no_loss() -> None:
    closed = 0

    def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal closed
        closed += 1
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    link = await linked(Scripted(server.sockets[0].getsockname()[:2]))
    await until(lambda: closed == 4)
    await asyncio.sleep(0.5)
    assert link.lost is None
    assert closed == 4
    await link.close()
    server.close()


async def test_a_process_that_closes_its_connection_before_it_stops_listening_has_ended() -> None:
    accepted = 0

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        writer.close()
        if accepted == 2:
            server.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    link = await linked(Scripted(server.sockets[0].getsockname()[:2]))
    await asyncio.wait_for(link.loss.wait(), 60)
    assert link.lost == "its process has ended"
    assert accepted == 2
    await link.close()


async def test_an_agent_whose_pulse_cannot_be_reached_has_its_beat() -> None:
    link = await linked(Scripted(("127.0.0.1", 1)))
    await asyncio.sleep(0.5)
    assert link.lost is None
    await link.close()


async def test_an_agent_that_cannot_listen_has_no_pulse() -> None:
    agent = modelled_agent("a")
    agent.host = "192.0.2.1"  # no machine has this address
    assert Attached.from_json(await agent.attach("head", wire.VERSION)).pulse is None
    await agent.close()


async def test_an_agent_holds_few_connections_and_drops_those_that_say_something() -> None:
    agent = modelled_agent("a")
    agent.host = "127.0.0.1"
    pulse = Attached.from_json(await agent.attach("head", wire.VERSION)).pulse
    assert pulse is not None
    opened = [await asyncio.open_connection(*pulse) for _ in range(20)]
    for reader, _ in opened[16:]:
        assert await reader.read() == b""
    opened[0][1].write(b"x")
    assert await opened[0][0].read() == b""
    await agent.close()
    for _, writer in opened:
        writer.close()


async def test_a_replica_that_took_a_request_back_serves_again_once_it_says_so() -> None:
    fake = FakeEngine("solver@a:0", lambda request: "x")
    await fake.start()
    report = wire.EngineReport(fake.stats(), fake.limits, ready=True)
    agent = Scripted()
    link = await linked(agent)
    engine = RemoteEngine("solver@a:0", link, report)

    async def call() -> None:
        async with aclosing(engine.generate(REQUEST)) as chunks:
            async for _ in chunks:
                pass

    calling = asyncio.create_task(call())
    await asyncio.sleep(0.1)
    [sent] = [message for message in agent.heard if isinstance(message, wire.Generate)]
    agent.items.append(wire.Ended(sent.number, wire.failure_of(Recalled())))
    with pytest.raises(Recalled):
        await calling
    assert not engine.is_ready
    engine.update(wire.EngineReport(fake.stats(), fake.limits, ready=False))  # READY, and about to be checked
    assert engine.state is EngineState.READY
    assert not engine.is_ready
    engine.update(report)
    assert engine.is_ready
    await link.close()


async def test_a_call_that_is_cancelled_from_within_ends_for_the_head() -> None:
    attachment = Attachment(1, "head", lambda attachment, message: None)

    async def cancelled() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.cancel)
        await future

    attachment.begin(7, cancelled())
    async for data in attachment.outbox():
        [message] = wire.from_agent.decode(data)
        break
    assert isinstance(message, wire.Ended)
    assert message.failure is not None
    assert message.number == 7
    assert isinstance(wire.error_of(message.failure), EngineDead)
