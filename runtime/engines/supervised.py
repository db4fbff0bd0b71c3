"""An engine that comes back: watched, started again when it dies or hangs, its requests held and served again.

To its callers it is one engine that is slow for a while. What an engine had streamed of a reply before it died is not
streamed again: the next one goes on after it.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from runtime.engines.account import Account
from runtime.engines.base import (
    Chunk,
    EngineHandle,
    EngineLimits,
    EngineState,
    EngineStats,
    GenerateRequest,
    Grant,
    Rejected,
    ResizeOutcome,
)
from runtime.errors import EngineDead, EngineError

Make = Callable[[Grant | None], EngineHandle]
"""A new engine that begins with a grant; None for the one that its specification says."""
Tell = Callable[[EngineState], None]


@dataclass(frozen=True)
class Patience:
    """Seconds and counts: how long a pulse may take before the engine counts as hanging, how often it is felt, the
    pauses before restarts, and how many restarts within a time, or crashes under one request, are too many."""

    hang_s: float = 60
    pulse_every_s: float = 2
    backoff_s: tuple[float, ...] = (0, 1, 2, 5, 10)
    restarts: int = 5
    within_s: float = 300
    crashes: int = 3


@dataclass
class _Given:
    """What of a reply was streamed."""

    tokens: list[int] = field(default_factory=list)
    characters: int = 0


class SupervisedEngine(EngineHandle):
    """One engine after another from `make`, under one name. The first start's errors are the caller's."""

    def __init__(
        self, name: str, make: Make, tell: Tell = lambda state: None, patience: Patience | None = None
    ) -> None:
        self.name = name
        self.account = Account()
        self._make = make
        self._tell = tell
        self._patience = patience or Patience()
        self._engine = make(None)
        self._up = asyncio.Event()
        self._suspected = asyncio.Event()
        self._failure: str | None = None
        self._restarts: deque[float] = deque()
        self._held = 0
        self._tending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._engine.start()
        self._hold()
        self._up.set()
        self._tell(EngineState.READY)
        self._tending = asyncio.create_task(self._tend(), name=f"tend {self.name}")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        with self.account.request(request):
            async with aclosing(self._serve(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk

    async def _serve(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """The reply of one engine after another, until one has finished it."""
        if request.schema is not None and request.seed is None and request.temperature:
            # A schema's grammar starts with the reply, so such a reply cannot be gone on with: it is written again,
            # and is the same only with a seed.
            request = replace(request, seed=secrets.randbits(31))
        given = _Given()
        for crash in range(self._patience.crashes):
            engine = await self._running()
            resumed = replace(request, request_id=f"{request.request_id}~{crash}") if crash else request
            try:
                async with aclosing(self._go_on(engine, resumed, given)) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        given.tokens += chunk.token_ids
                        given.characters += len(chunk.text)
                        yield chunk
                return
            except EngineDead:
                self._suspect(engine)
        raise EngineDead(f"engine {self.name} died {self._patience.crashes} times under this request: it is given up")

    async def _go_on(self, engine: EngineHandle, request: GenerateRequest, given: "_Given") -> AsyncIterator[Chunk]:
        """The rest of a reply of which some was streamed already."""
        if request.schema is None:
            request = replace(request, given=tuple(given.tokens))
        again = [] if request.schema is None else list(given.tokens)
        written: list[int] = []
        text = ""
        async with aclosing(engine.generate(request)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if not again:
                    yield chunk
                    continue
                written += chunk.token_ids
                text += chunk.text
                if any(a != b for a, b in zip(written, again, strict=False)):
                    raise EngineError(f"engine {self.name} died, and what it wrote then does not go on from before")
                if len(written) > len(again) or chunk.finish is not None:
                    yield replace(chunk, text=text[given.characters :], token_ids=tuple(written[len(again) :]))
                    again = []

    def _suspect(self, engine: EngineHandle) -> None:
        """A request has found this engine dead: see to it now."""
        if engine is self._engine:
            self._up.clear()
            self._suspected.set()

    async def _running(self) -> EngineHandle:
        """The engine, once there is one that runs. Raises EngineDead when there will be none."""
        self._held += 1
        try:
            while True:
                await self._up.wait()
                if self._failure is not None:
                    raise EngineDead(self._failure)
                if self._engine.stats().state is EngineState.READY:
                    return self._engine
                self._suspect(self._engine)
        finally:
            self._held -= 1

    async def _tend(self) -> None:
        """Feel the pulse; without one, start anew. Ends when the engine keeps failing, or with the fleet."""
        while self._failure is None:
            if not await self._lives():
                self._up.clear()
                self._tell(EngineState.DEAD)
                await self._restart()

    async def _lives(self) -> bool:
        """Wait a while, or until a request has found the engine dead; then see."""
        patience = self._patience
        with suppress(
            TimeoutError
        ):  # asyncio.timeout and not wait_for, which in Python 3.11 can swallow a cancellation
            async with asyncio.timeout(patience.pulse_every_s):
                await self._suspected.wait()
        self._suspected.clear()
        try:
            async with asyncio.timeout(patience.hang_s):
                await self._engine.pulse()
        except TimeoutError:
            self._engine.kill()  # its requests find it dead, like any other
            return False
        except EngineError:
            return False
        self._up.set()
        return True

    async def _restart(self) -> None:
        """Start a new engine with the last grant, with pauses in between; after too many in a while, give up."""
        grant = self._engine.stats().grant
        reason = "it died"
        while True:
            await self._engine.close()
            now = time.monotonic()
            while self._restarts and self._restarts[0] < now - self._patience.within_s:
                self._restarts.popleft()
            count = len(self._restarts)
            if count >= self._patience.restarts:
                self._failure = (
                    f"engine {self.name} keeps failing: {count} restarts within {self._patience.within_s:g} s; {reason}"
                )
                self._tell(EngineState.FAILED)
                self._up.set()  # for those who wait to be told
                return
            self._restarts.append(now)
            await asyncio.sleep(self._patience.backoff_s[min(count, len(self._patience.backoff_s) - 1)])
            self._tell(EngineState.STARTING)
            self._engine = self._make(grant)
            try:
                await self._engine.start()
            except EngineError as error:
                reason = str(error)
                continue
            self._up.set()
            self._tell(EngineState.READY)
            return

    @property
    def limits(self) -> EngineLimits:
        return self._engine.limits

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        if self._failure is not None:
            return Rejected(grant, self._failure)
        outcome = await self._engine.resize(grant, grace_s)
        self._hold()
        return outcome

    def _hold(self) -> None:
        """Charge for what the engine's grant says from now on."""
        if (grant := self._engine.stats().grant) is not None:
            self.account.hold(self._engine.limits.held_bytes(grant.gpu_memory_utilization))

    def stats(self) -> EngineStats:
        stats = self._engine.stats()
        state = EngineState.FAILED if self._failure is not None else stats.state
        return replace(stats, state=state, waiting=stats.waiting + self._held)

    async def pulse(self) -> None:
        await self._engine.pulse()

    def kill(self) -> None:
        self._engine.kill()

    async def close(self) -> None:
        self._failure = self._failure or f"engine {self.name} is closed"
        if self._tending:
            self._tending.cancel()
            await asyncio.wait([self._tending])
        self._up.set()
        await self._engine.close()
