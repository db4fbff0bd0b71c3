"""A deterministic engine without a model: replies come from a function, times and memory from a service model.

For tests and for work on workflows and policies. `time_scale` 0 answers at once; 1 takes the modelled time. A step
of the modelled engine decodes one token for every running request and takes `step_s` + `token_s` x running seconds,
so that a fuller batch is slower for each but faster for all. A request runs when the grant has a place for it and
memory for its prompt and all that it may write; others wait, first come, first served.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from runtime.engines.base import (
    Applied,
    Chunk,
    Deferred,
    EngineHandle,
    EngineLimits,
    EngineState,
    EngineStats,
    GenerateRequest,
    Grant,
    Rejected,
    ResizeOutcome,
    Superseded,
)
from runtime.errors import EngineDead

Script = Callable[[GenerateRequest], str]


@dataclass(frozen=True)
class ServiceTime:
    """Seconds: a decoding step takes `step_s` and `token_s` for each running request; a prompt token `prefill_s`."""

    step_s: float = 0.002
    token_s: float = 0.0001
    prefill_s: float = 0.00005


@dataclass(frozen=True)
class FakeMemory:
    """Bytes: the device, what the engine holds besides its KV cache, its floor, and what a token takes."""

    device: int = 1000
    fixed: int = 100
    floor: int = 50
    token: int = 0


class FakeEngine(EngineHandle):
    """Answers `script(request)`, a blank-separated word a token. `kill` ends it from then on, as a crash would."""

    def __init__(
        self,
        name: str,
        script: Script,
        max_num_seqs: int = 64,
        times: ServiceTime | None = None,
        time_scale: float = 0,
        memory: FakeMemory | None = None,
        grant: Grant | None = None,
    ) -> None:
        self.name = name
        self._script = script
        self._times = times or ServiceTime()
        self._time_scale = time_scale
        self._memory = memory = memory or FakeMemory()
        self._limits = EngineLimits(
            device_bytes=memory.device,
            fixed_bytes=memory.fixed,
            kv_floor_bytes=memory.floor,
            kv_ceiling_bytes=memory.device - memory.fixed,
            seqs_ceiling=max_num_seqs,
            step_tokens_floor=1,
            step_tokens_ceiling=2048,
        )
        self.grant = grant or Grant(1.0, max_num_seqs, 2048)
        self._state = EngineState.STARTING
        self._queue: list[asyncio.Event] = []
        self._admitted: list[int] = []  # bytes that each running request holds
        self._shrink: tuple[Deferred, asyncio.TimerHandle] | None = None
        self._requests = self._prompt_tokens = self._completion_tokens = 0

    async def start(self) -> None:
        self._state = EngineState.READY

    def kill(self) -> None:
        self._state = EngineState.DEAD
        for waiting in self._queue:
            waiting.set()

    async def pulse(self) -> None:
        self._check()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self._check()
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        held = (prompt_tokens + request.max_tokens) * self._memory.token
        if self._queue or not self._fits(held):
            await self._turn(held)
        self._admitted.append(held)
        try:
            async for chunk in self._reply(request, prompt_tokens):
                yield chunk
        finally:
            self._admitted.remove(held)
            self._moved()

    async def _turn(self, held: int) -> None:
        """Wait to be first in the queue and fit."""
        moved = asyncio.Event()
        self._queue.append(moved)
        try:
            while self._queue[0] is not moved or not self._fits(held):
                await moved.wait()
                moved.clear()
                self._check()
        finally:
            self._queue.remove(moved)
            self._moved()

    def _fits(self, held: int) -> bool:
        room = self._limits.kv_cache_bytes(self.grant.gpu_memory_utilization) - sum(self._admitted)
        return len(self._admitted) < self.grant.max_active_seqs and held <= room

    def _moved(self) -> None:
        """Something was let go or granted: the next in the queue may fit, and a shrink may be through."""
        if self._queue:
            self._queue[0].set()
        if self._shrink and sum(self._admitted) <= self._limits.kv_cache_bytes(self.grant.gpu_memory_utilization):
            self._settle(self._applied(self.grant))

    async def _reply(self, request: GenerateRequest, prompt_tokens: int) -> AsyncIterator[Chunk]:
        self._requests += 1
        self._prompt_tokens += prompt_tokens
        self._moved()  # whoever is next may fit beside this one
        await self._spend(prompt_tokens * self._times.prefill_s)
        words = self._script(request).split(" ")
        pieces = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        cut = len(pieces) > request.max_tokens
        pieces = pieces[len(request.given) : request.max_tokens]
        if not self._time_scale:  # all at once: what is measured then is the caller, not this loop
            self._completion_tokens += len(pieces)
            yield Chunk(
                "".join(pieces),
                tuple(map(_token, pieces)),
                time.monotonic(),
                prompt_tokens,
                "length" if cut else "stop",
            )
            return
        for index, piece in enumerate(pieces):
            await self._spend(self._times.step_s + self._times.token_s * len(self._admitted))
            self._check()
            self._completion_tokens += 1
            last = index + 1 == len(pieces)
            finish = ("length" if cut else "stop") if last else None
            yield Chunk(piece, (_token(piece),), time.monotonic(), prompt_tokens, finish)

    async def _spend(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._time_scale)

    def _check(self) -> None:
        if self._state is not EngineState.READY:
            raise EngineDead(f"engine {self.name} is {self._state}")

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        if self._state is not EngineState.READY:
            return Rejected(grant, f"engine {self.name} is {self._state}")
        if complaint := self._limits.complaint(grant):
            return Rejected(grant, f"engine {self.name}: {complaint}")
        self._settle(None)
        before, self.grant = self.grant, grant
        held = sum(self._admitted) - self._limits.kv_cache_bytes(grant.gpu_memory_utilization)
        if held > 0 and grace_s > 0:
            loop = asyncio.get_running_loop()
            deferred = Deferred(grant, held, grace_s, loop.create_future())
            timer = loop.call_later(grace_s, lambda: self._settle(self._applied(grant, preempted=1)))
            self._shrink = deferred, timer
            return deferred
        self._moved()
        return self._applied(grant, moved=abs(grant.gpu_memory_utilization - before.gpu_memory_utilization))

    def _applied(self, grant: Grant, moved: float = 0, preempted: int = 0) -> Applied:
        kv = self._limits.kv_cache_bytes(grant.gpu_memory_utilization)
        return Applied(grant, kv, int(moved * self._memory.device), 0.0, 0.0, preempted)

    def _settle(self, outcome: Applied | None) -> None:
        """End the shrink that is under way: None where a newer grant takes its place."""
        if self._shrink:
            (deferred, timer), self._shrink = self._shrink, None
            timer.cancel()
            deferred.settled.set_result(outcome or Superseded(deferred.grant))

    def stats(self) -> EngineStats:
        kv = self._limits.kv_cache_bytes(self.grant.gpu_memory_utilization)
        return EngineStats(
            state=self._state,
            grant=self.grant,
            kv_cache_bytes=kv,
            running=len(self._admitted),
            waiting=len(self._queue),
            kv_cache_usage=sum(self._admitted) / kv,
            requests=self._requests,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    async def close(self) -> None:
        self._state = EngineState.CLOSED
        self._settle(None)


def _token(piece: str) -> int:
    """A token's id: the same piece, the same id."""
    return zlib.crc32(piece.encode()) % 50_000
