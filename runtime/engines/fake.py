"""A deterministic engine without a model: replies come from a function, times from a service-time model.

For tests and for work on workflows and policies. `time_scale` 0 answers at once; 1 takes the modelled time. A step
of the modelled engine decodes one token for every running request and takes `step_s` + `token_s` x running seconds,
so that a fuller batch is slower for each but faster for all; at most `max_num_seqs` requests run, others wait.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from runtime.engines.base import Chunk, EngineHandle, EngineState, EngineStats, GenerateRequest
from runtime.errors import EngineDead, EngineError

Script = Callable[[GenerateRequest], str]


@dataclass(frozen=True)
class ServiceTime:
    """Seconds: a decoding step takes `step_s` and `token_s` for each running request; a prompt token `prefill_s`."""

    step_s: float = 0.002
    token_s: float = 0.0001
    prefill_s: float = 0.00005


class FakeEngine(EngineHandle):
    """Answers `script(request)`, a blank-separated word a token. `fail` ends it from then on, as a crash would."""

    def __init__(
        self, name: str, script: Script, max_num_seqs: int = 64, times: ServiceTime | None = None, time_scale: float = 0
    ) -> None:
        self.name = name
        self._script = script
        self._times = times or ServiceTime()
        self._time_scale = time_scale
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._state = EngineState.STARTING
        self._running = self._waiting = self._requests = self._prompt_tokens = self._completion_tokens = 0
        self._max_num_seqs = max_num_seqs

    async def start(self) -> None:
        self._state = EngineState.READY

    def fail(self) -> None:
        """Die, as an engine whose process was killed: requests in flight and to come raise EngineDead."""
        self._state = EngineState.DEAD

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self._check()
        self._waiting += 1
        waiting = True
        try:
            async with self._slots:
                self._waiting -= 1
                waiting = False
                self._running += 1
                try:
                    async for chunk in self._reply(request):
                        yield chunk
                finally:
                    self._running -= 1
        finally:
            self._waiting -= waiting

    async def _reply(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        self._requests += 1
        self._prompt_tokens += prompt_tokens
        await self._spend(prompt_tokens * self._times.prefill_s)
        words = self._script(request).split(" ")
        pieces = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        cut = len(pieces) > request.max_tokens
        pieces = pieces[: request.max_tokens]
        if not self._time_scale:  # all at once: what is measured then is the caller, not this loop
            self._completion_tokens += len(pieces)
            ids = tuple(range(len(pieces)))
            yield Chunk("".join(pieces), ids, time.monotonic(), prompt_tokens, "length" if cut else "stop")
            return
        for index, piece in enumerate(pieces):
            await self._spend(self._times.step_s + self._times.token_s * self._running)
            self._check()
            self._completion_tokens += 1
            last = index + 1 == len(pieces)
            finish = ("length" if cut else "stop") if last else None
            yield Chunk(piece, (index,), time.monotonic(), prompt_tokens, finish)

    async def _spend(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._time_scale)

    def _check(self) -> None:
        if self._state is EngineState.DEAD:
            raise EngineDead(f"engine {self.name} died")
        if self._state is not EngineState.READY:
            raise EngineError(f"engine {self.name} is {self._state}")

    def stats(self) -> EngineStats:
        return EngineStats(
            state=self._state,
            running=self._running,
            waiting=self._waiting,
            kv_cache_usage=self._running / self._max_num_seqs,
            requests=self._requests,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    async def close(self) -> None:
        self._state = EngineState.CLOSED
