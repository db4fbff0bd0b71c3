"""An engine that comes back: watched, started again when it dies or hangs, its requests held and served again.

To its callers it is one engine that is slow for a while. What an engine had streamed of a reply before it died is not
streamed again: the next one goes on after it. A request that makes its engines crash is not sent again (quarantine).
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from runtime.engines.grant import EngineLimits, Grant, Rejected, ResizeOutcome
from runtime.engines.handle import EngineHandle, EngineState, EngineStats
from runtime.engines.quarantine import Call, Quarantine
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import UsageMeter
from runtime.errors import Death, EngineDead, EngineError, RequestQuarantined

Make = Callable[[Grant | None], EngineHandle]
"""A new engine that begins with a grant; None for the one that its specification says."""
Tell = Callable[[EngineState], None]


@dataclass(frozen=True)
class Patience:
    """Seconds and counts: how long a pulse may take before the engine counts as hanging, how often it is felt, the
    pauses before restarts, and how many restarts within a time are too many."""

    hang_s: float = 60
    pulse_every_s: float = 2
    backoff_s: tuple[float, ...] = (0, 1, 2, 5, 10)
    restarts: int = 5
    within_s: float = 300


class SupervisedEngine(EngineHandle):
    """One engine after another from `make`, under one name. The first start's errors are the caller's."""

    def __init__(
        self, name: str, make: Make, tell: Tell = lambda state: None, patience: Patience | None = None
    ) -> None:
        self.name = name
        self.usage = UsageMeter()
        self._make = make
        self._tell = tell
        self._patience = patience or Patience()
        self._engine = make(None)
        self._up = asyncio.Event()
        self._suspected = asyncio.Event()
        self._judged: EngineHandle | None = None
        self._quarantine = Quarantine()
        self._limits: EngineLimits | None = None
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

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        with self.usage.request(request.rank(asyncio.get_running_loop().time())):
            async with aclosing(self._serve(request)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _serve(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Stream the reply of one engine after another, until one has finished it."""
        if not request.resumable and request.seed is None and request.temperature:
            request = replace(request, seed=secrets.randbits(31))  # written again, it is the same only with a seed
        call, attempt = Call(), 0
        while True:
            async with self._quarantine.turn(call):
                engine = await self._running()
                if self._quarantine.must_wait(call):
                    continue
                self._quarantine.sent(call)
                try:
                    async with aclosing(self._rest(engine, request, attempt, call)) as chunks:
                        async for chunk in chunks:
                            self._quarantine.streamed(call, chunk)
                            yield chunk
                    return
                except EngineDead as error:
                    attempt += 1
                    self._found_dead(engine, error.death)
                    if call.poison:
                        why = f"engine {self.name} {call.poison}; this request is the likeliest cause"
                        raise RequestQuarantined(f"{why}, and is not sent again") from error

    def _rest(
        self, engine: EngineHandle, request: GenerateRequest, attempt: int, call: Call
    ) -> AsyncGenerator[Chunk, None]:
        """The rest of a reply of which some may have been streamed by an engine that died."""
        if attempt:  # vLLM's traces of the request before are those of another
            request = replace(request, request_id=f"{request.request_id}~{attempt}")
        if not call.tokens:
            return engine.generate(request)
        if request.resumable:
            return engine.generate(replace(request, given=tuple(call.tokens)))
        return self._written_again(engine, request, call)

    async def _written_again(
        self, engine: EngineHandle, request: GenerateRequest, call: Call
    ) -> AsyncGenerator[Chunk, None]:
        """Let the engine write the reply from its beginning; stream what comes after the tokens that were streamed."""
        known, known_characters = list(call.tokens), call.characters
        written: list[int] = []
        text = ""
        async with aclosing(engine.generate(request)) as chunks:
            async for chunk in chunks:
                if len(written) > len(known):
                    yield chunk
                    continue
                written += chunk.token_ids
                text += chunk.text
                if any(a != b for a, b in zip(written, known, strict=False)):
                    raise EngineError(f"engine {self.name} died, and what it wrote then does not go on from before")
                if len(written) > len(known) or chunk.finish is not None:
                    yield replace(chunk, text=text[known_characters:], token_ids=tuple(written[len(known) :]))

    def _found_dead(self, engine: EngineHandle, death: Death) -> None:
        """Judge the requests that a dead engine had, once, and see to the engine now. Closing it is nobody's fault."""
        if self._failure is None and engine is self._engine and engine is not self._judged:
            self._judged = engine
            self._quarantine.died(death)
            self._see_to()

    def _see_to(self) -> None:
        """Hold new requests, and let the engine be looked at now."""
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
                self._see_to()
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
            self._found_dead(self._engine, Death.HUNG)
            self._engine.kill()  # its requests find it dead, like any other
            return False
        except EngineDead as error:
            self._found_dead(self._engine, error.death)
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
            self._hold()
            self._up.set()
            self._tell(EngineState.READY)
            return

    @property
    def limits(self) -> EngineLimits:
        """Return the limits of the running engine; during a restart, those of the engine before it."""
        return self._limits or self._engine.limits

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        if self._failure is not None:
            return Rejected(grant, self._failure)
        outcome = await self._engine.resize(grant, grace_s)
        self._hold()
        return outcome

    def _hold(self) -> None:
        """Keep the limits of an engine that is up, and charge for what its grant says from now on."""
        stats = self._engine.stats()
        if stats.state is EngineState.READY and stats.grant is not None:
            self._limits = self._engine.limits
            self.usage.hold(self._limits.held_bytes(stats.grant.gpu_memory_utilization))

    def stats(self) -> EngineStats:
        stats = self._engine.stats()
        state = EngineState.FAILED if self._failure is not None else stats.state
        return replace(stats, state=state, waiting=stats.waiting + self._held + self._quarantine.waiting)

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
