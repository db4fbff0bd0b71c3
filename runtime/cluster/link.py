"""The head's connection to one agent: its calls, and whether the agent is lost."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Protocol

from runtime.cluster import wire
from runtime.cluster.plan import Attached
from runtime.engines.request import Chunk
from runtime.errors import Death, EngineDead, EngineError, TroupeError

LOOK_S = 0.1
PULSE_S = 1.0
"""Seconds to wait while connecting to an agent's pulse."""
PULSE_TRIES, PULSE_PAUSE_S = 3, 0.02
"""Number of tries to connect again after a pulse has been closed, and seconds to wait after each."""
EXPECT_S = 0.25
"""Seconds between two heartbeats of the head, at most."""


class Unreachable(Exception):
    """The agent's process, or its node, is gone."""


class AgentHandle(Protocol):
    """An agent, wherever it is: see Agent. All methods raise Unreachable if it is gone."""

    async def attach(self, head: str, wire_version: int) -> bytes: ...
    async def gpus(self) -> list[int]: ...
    async def start(self, plan: bytes) -> bytes: ...
    async def control(self, known: bytes) -> None: ...
    def outbox(self, epoch: int) -> AsyncIterator[bytes]: ...
    def take(self, epoch: int, number: int, data: bytes) -> None:
        """Send messages without waiting. Results arrive through the outbox."""

    async def close(self) -> None:
        """Let the agent stop its engines, then end it."""

    def kill(self) -> None:
        """End the agent's process at once, and its engines with it."""


class Link:
    """The connection to an agent. After each loss, its owner calls `attach` again.

    `on_message` takes everything that concerns no call. `on_loss` is called when the agent is lost: its process has
    ended, or it has been silent for `lost_s`. `lost` then says why; it is None if the agent is not lost. `loss` is set
    when the agent is lost, and cleared by the next `attach`.
    """

    def __init__(self, node: str, on_message: Callable[[wire.FromAgent], None], on_loss: Callable[[], None]) -> None:
        self.node = node
        self.lost: str | None = "it has not been attached yet"
        self.loss = asyncio.Event()
        self._on_message = on_message
        self._on_loss = on_loss
        self._found = asyncio.Event()
        self._agent: AgentHandle | None = None
        self._epoch = 0
        self._sent = 0
        self._pending: list[wire.ToAgent] = []
        self._numbers = count()
        self._calls: dict[int, asyncio.Queue[Chunk | wire.Failure | None]] = {}
        self._pulse: tuple[str, int] | None = None
        self._heard_s = 0.0
        self._lost_s: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def attach(self, agent: AgentHandle, head: str) -> Attached:
        """Attach this head to an agent. Raises Unreachable, and Refused if the agent serves another head."""
        self._cancel()
        self.loss.clear()
        attached = Attached.from_json(await agent.attach(head, wire.VERSION))
        self._agent, self._epoch, self._sent, self._pending = agent, attached.epoch, 0, []
        self._pulse = attached.pulse
        return attached

    def begin(self, lost_s: float | None) -> None:
        """Read the agent's outbox, and send heartbeats.

        With `lost_s`, the agent serves, and is lost once it has been silent for that time.
        """
        self._heard_s = asyncio.get_running_loop().time()
        self._lost_s = lost_s
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._read(), name=f"read from {self.node}"),
                asyncio.create_task(self._watch(), name=f"watch {self.node}"),
                asyncio.create_task(self._feel_pulse(), name=f"pulse of {self.node}"),
            ]
        if lost_s is not None and not self.loss.is_set():
            self.lost = None
            self._found.set()

    async def until_found(self) -> None:
        """Wait until the agent is not lost."""
        await self._found.wait()

    def post(self, message: wire.ToAgent) -> None:
        """Send a message with all others of this tick of the event loop. A lost agent gets none."""
        if self.lost is None:
            if not self._pending:
                asyncio.get_running_loop().call_soon(self._flush)
            self._pending.append(message)

    def _flush(self) -> None:
        messages, self._pending = self._pending, []
        if messages and self.lost is None:
            self._send(messages)

    def _send(self, messages: list[wire.ToAgent]) -> None:
        assert self._agent is not None
        self._agent.take(self._epoch, self._sent, wire.encode(messages))
        self._sent += 1

    async def stream(self, make: Callable[[int], wire.ToAgent]) -> AsyncGenerator[Chunk, None]:
        """Send the message of a call, made for its number, and stream what it answers. Closing aborts the call.

        Raises what the call raised there, and EngineDead if the agent is lost.
        """
        if self.lost is not None:
            raise self._loss()
        number = next(self._numbers)
        answers = self._calls[number] = asyncio.Queue()
        ended = False
        try:
            self.post(make(number))
            while isinstance(answer := await answers.get(), Chunk):
                ended = answer.finish is not None
                yield replace(answer, time_s=time.monotonic())
                if ended:
                    return
            ended = True
            if answer is not None:
                raise wire.error_of(answer)
        finally:
            del self._calls[number]
            if not ended:
                self.post(wire.Abort(number))

    async def call(self, make: Callable[[int], wire.ToAgent]) -> None:
        """Send the message of a call that streams nothing, and wait for its end. Raises what `stream` raises."""
        async for _ in self.stream(make):
            pass

    def drop(self) -> None:
        """Give the agent up until it is attached again."""
        self._lose("it has not been attached again")
        self._cancel()

    def expect_end(self) -> None:
        """Let the agent end without a call of `on_loss`."""
        self._on_loss = lambda: None

    async def close(self) -> None:
        """Stop reading, and end all calls."""
        self.expect_end()
        self._lose("the head closes it")
        tasks = self._tasks
        self._cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    async def _read(self) -> None:
        assert self._agent is not None
        why: str | None = "its outbox cannot be read"
        try:
            while True:
                async for data in self._agent.outbox(self._epoch):
                    self._heard_s = asyncio.get_running_loop().time()
                    for message in wire.from_agent.decode(data):
                        self._hear(message)
        except (Unreachable, TroupeError) as error:
            why = str(error)
        except asyncio.CancelledError:
            why = None  # the task that cancels this one decides whether the agent is lost
            raise
        finally:
            if why is not None:
                self._lose(why)

    def _hear(self, message: wire.FromAgent) -> None:
        match message:
            case wire.Streamed():
                if answers := self._calls.get(message.number):
                    answers.put_nowait(message.chunk)
            case wire.Ended():
                if answers := self._calls.get(message.number):
                    answers.put_nowait(message.failure)
            case _:
                self._on_message(message)

    async def _feel_pulse(self) -> None:
        """Detect the end of the agent's process by its closed connection. Without one, only the beat shows it."""
        if self._pulse is None:
            return
        try:
            async with asyncio.timeout(PULSE_S):
                reader, writer = await asyncio.open_connection(*self._pulse)
        except (OSError, TimeoutError) as error:  # a firewall is between them
            logging.getLogger(__name__).info("node %s can be watched by its beat only: %s", self.node, error)
            return
        try:
            with suppress(OSError):
                await reader.read(1)
        finally:
            writer.close()
        if await self._is_refused():
            self._lose("its process has ended")

    async def _is_refused(self) -> bool:
        """Return True if nothing listens at the pulse any more. Something between may have closed the connection.

        A process that ends may close its connection before it stops listening, so one try is not enough.
        """
        assert self._pulse is not None
        for _ in range(PULSE_TRIES):
            try:
                async with asyncio.timeout(PULSE_S):
                    _, writer = await asyncio.open_connection(*self._pulse)
            except (OSError, TimeoutError):
                return True
            writer.close()
            await asyncio.sleep(PULSE_PAUSE_S)
        logging.getLogger(__name__).info("the pulse of node %s has been closed; its beat is left", self.node)
        return False

    async def _watch(self) -> None:
        told_s = looked_s = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(LOOK_S)
            now_s = asyncio.get_running_loop().time()
            if now_s - looked_s > 3 * LOOK_S:  # this process was held up, not the agent
                self._heard_s = now_s
            looked_s = now_s
            if self._lost_s is not None and now_s - self._heard_s > self._lost_s:
                self._lose(f"it has said nothing for {self._lost_s:g} s")
                return
            if now_s - told_s >= EXPECT_S:
                told_s = now_s
                self._send([wire.Expect({})])

    def _lose(self, why: str) -> None:
        if self.loss.is_set():
            return
        self.loss.set()
        served = self.lost is None
        self.lost = why
        if not served:
            return
        self._found.clear()
        for answers in self._calls.values():
            answers.put_nowait(wire.failure_of(self._loss()))
        self._on_loss()

    def _loss(self) -> EngineError:
        return EngineDead(f"node {self.node} is lost: {self.lost}", Death.KILLED)
