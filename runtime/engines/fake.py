"""A deterministic engine without a model. Replies come from a function, times and memory from a service model.

It serves tests, development of workflows and policies, and simulation on a virtual clock.

The modelled engine runs steps as vLLM does, with chunked prefill. A step decodes one token for each running request
whose prompt is computed, and spends the rest of `max_step_tokens` on prompts, in order of admission. A prompt that is
longer than the rest takes several steps. Waiting requests are admitted in the order of their rank while the grant has
room for another request, the step has room for a token, and the KV cache has blocks for the whole prompt. If a running
request needs another block and none is free, the engine preempts the request that was admitted last and recomputes it
later.
"""

import asyncio
import zlib
from bisect import insort
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from runtime.engines.grant import Applied, Deferred, EngineLimits, Grant, Rejected, ResizeOutcome, Superseded
from runtime.engines.handle import EngineHandle, EngineState, EngineStats, Work
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import Held, UsageMeter
from runtime.errors import Death, EngineDead, EngineError

Script = Callable[[GenerateRequest], str]
"""Returns the reply to a request. Each of its words, which single blanks separate, is a token."""
Lengths = Callable[[GenerateRequest], tuple[int, int]]
"""Returns the lengths of a request's prompt and of its reply, in tokens."""


@dataclass(frozen=True)
class ServiceTime:
    """The durations of an engine's work, in seconds.

    A step takes `step_s`, plus `token_s` for each request that it decodes, plus `prefill_s` for each prompt token that
    it computes. A call from outside (a request or a resize) takes `call_s` of the time of the process that makes it.
    Starting, going to sleep and waking take `start_s`, `sleep_s` and `wake_s`.
    """

    step_s: float = 0.002
    token_s: float = 0.0001
    prefill_s: float = 0.00005
    call_s: float = 0.0
    start_s: float = 0.0
    sleep_s: float = 0.0
    wake_s: float = 0.0


@dataclass(frozen=True)
class FakeMemory:
    """The memory of a fake engine, in bytes.

    - `device`: the whole device; `fixed`: what the engine holds besides its KV cache; `floor`: its smallest KV cache.
    - `token`: what a token takes in the KV cache. Memory is allocated in blocks of `block_tokens` tokens.
    - `asleep`: what the engine keeps while it sleeps with its process alive.
    """

    device: int = 1000
    fixed: int = 100
    floor: int = 50
    token: int = 0
    block_tokens: int = 1
    asleep: int = 0


class Processor:
    """A processor that several users share. If there are more of them at once than `lanes`, all become slower."""

    def __init__(self, lanes: float) -> None:
        self._lanes = lanes
        self._busy = 0

    async def spend(self, seconds: float) -> None:
        """Compute for as long as `seconds` of work take beside the other users."""
        self._busy += 1
        try:
            await asyncio.sleep(seconds * max(1.0, self._busy / self._lanes))
        finally:
            self._busy -= 1


@dataclass(eq=False)
class _Sequence:
    """One request in the engine.

    - `uncomputed`: how many tokens to compute before it can decode: the rest of its prompt and, after a preemption, of
      what it had generated.
    - `pieces`: the tokens of its reply; `generated`, `sent`: how many of them are generated and streamed.
    - `chunks`: what is streamed; None if the engine has died.
    """

    number: int
    rank: int
    request: GenerateRequest
    prompt_tokens: int
    uncomputed: int
    pieces: list[str]
    finish: str
    generated: int = 0
    sent: int = 0
    chunks: asyncio.Queue[Chunk | None] = field(default_factory=asyncio.Queue)


class FakeEngine(EngineHandle):
    """An engine that replies with `script(request)`.

    - `time_scale`: 1 takes the modelled time, 0 replies immediately.
    - `grant`: the grant that it starts with. None takes the whole device.
    - `processor`: what it computes on, shared with other engines.
    - `front`: the process that its calls come from, shared with other engines.
    - `naps`: it keeps its process while it sleeps, as on a GPU, unless the sleep is deep.
    - `lengths`: the lengths to model. Tokens without text precede a shorter reply; a longer one keeps its own length.
      None counts words.

    `kill` ends it from outside, `crash` from inside.
    """

    def __init__(
        self,
        name: str,
        script: Script,
        max_num_seqs: int = 64,
        times: ServiceTime | None = None,
        time_scale: float = 0,
        memory: FakeMemory | None = None,
        grant: Grant | None = None,
        processor: Processor | None = None,
        front: Processor | None = None,
        lengths: Lengths | None = None,
        naps: bool = False,
    ) -> None:
        self.name = name
        self.usage = UsageMeter()
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
            block_bytes=memory.token * memory.block_tokens,
            block_tokens=memory.block_tokens,
            asleep_bytes=memory.asleep if naps else 0,
            copy_bytes=memory.fixed - memory.asleep if naps else 0,
        )
        self.grant = grant or Grant(1.0, max_num_seqs, 2048)
        self._processor = processor or Processor(lanes=1e9)
        self._front = front or Processor(lanes=1e9)
        self._lengths = lengths
        self._naps = naps
        self._state = EngineState.STARTING
        self._started = False
        self._death = Death.CRASHED
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._stepping: asyncio.Task[None] | None = None
        self._between_steps = asyncio.Event()
        self._shrink: tuple[Deferred, asyncio.TimerHandle] | None = None
        self._work = Work()
        self._requests = self._prompt_tokens = self._completion_tokens = self._preemptions = 0

    @property
    def state(self) -> EngineState:
        return self._state

    async def start(self) -> None:
        await self._pass(self._times.start_s)
        self._state, self._started = EngineState.READY, True
        self.usage.hold(self.held_bytes)

    def kill(self) -> None:
        self._die(Death.KILLED)

    def crash(self) -> None:
        """End as after a fatal error in vLLM's worker."""
        self._die(Death.CRASHED)

    def _die(self, death: Death) -> None:
        self._state, self._death = EngineState.DEAD, death
        for sequence in (*self._running, *self._waiting):
            sequence.chunks.put_nowait(None)

    async def pulse(self) -> None:
        self._check()

    async def sleep(self, deep: bool = False) -> None:
        self._check()
        if self._running or self._waiting:
            raise EngineError(f"engine {self.name} has requests in flight and cannot go to sleep")
        self._state = EngineState.DRAINING
        await self._pass(self._times.sleep_s)
        self._settle_shrink(None)
        self._state = EngineState.ASLEEP if self._naps and not deep else EngineState.COLD
        self.usage.hold(self.held_bytes, Held.ASLEEP)

    async def wake(self) -> None:
        if self._state is not EngineState.ASLEEP:
            raise EngineError(f"engine {self.name} is {self._state} and cannot wake")
        self._state = EngineState.WAKING
        self.grant = self._limits.smallest_grant
        self.usage.hold(self.held_bytes, Held.WAKING)
        await self._pass(self._times.wake_s)
        self.usage.hold(self.held_bytes)
        self._state = EngineState.READY

    async def _pass(self, seconds: float) -> None:
        """Spend modelled time. Raise EngineDead if the engine was killed meanwhile."""
        if seconds and self._time_scale:
            await asyncio.sleep(seconds * self._time_scale)
        if self._state is EngineState.DEAD:
            raise self._dead()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self._check()
        sequence = self._sequence(request)
        self._check()  # the script may have ended the engine
        self._requests += 1
        if self._times.call_s:
            await self._front.spend(self._times.call_s * self._time_scale)
            self._check()
        self._enqueue(sequence)
        self._begin_steps()
        try:
            if not self._time_scale and not self._waiting:  # one chunk, so that only the caller costs time
                yield self._chunk(sequence, len(sequence.pieces))
                return
            while True:
                chunk = await sequence.chunks.get()
                if chunk is None:
                    raise self._dead()
                yield chunk
                if chunk.finish is not None:
                    return
        finally:
            self._remove(sequence)

    def _sequence(self, request: GenerateRequest) -> _Sequence:
        words = self._script(request).split(" ")
        pieces = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        finish = "length" if request.max_tokens is not None and len(pieces) > request.max_tokens else "stop"
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        if request.rendered is not None:
            prompt_tokens = len(request.rendered["prompt_token_ids"])
        pieces = pieces[: request.max_tokens]
        if self._lengths:
            prompt_tokens, reply_tokens = self._lengths(request)
            pieces = [""] * (reply_tokens - len(pieces)) + pieces
        rank = request.rank(asyncio.get_running_loop().time())
        uncomputed = prompt_tokens + len(request.resume_tokens) if self._time_scale else 0
        rest = pieces[len(request.resume_tokens) :]
        return _Sequence(self._requests, rank, request, prompt_tokens, uncomputed, rest, finish)

    def _chunk(self, sequence: _Sequence, upto: int) -> Chunk:
        """Return what was generated up to token `upto` and not streamed yet."""
        pieces = sequence.pieces[sequence.sent : upto]
        self._prompt_tokens += 0 if sequence.sent else sequence.prompt_tokens
        self._completion_tokens += len(pieces)
        sequence.sent = upto
        finish = sequence.finish if upto >= len(sequence.pieces) else None
        now_s = asyncio.get_running_loop().time()
        return Chunk("".join(pieces), tuple(map(_token, pieces)), now_s, sequence.prompt_tokens, finish)

    def _begin_steps(self) -> None:
        """Admit requests, and run steps until no request runs."""
        if not self._time_scale:
            self._admit()
        elif self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._steps(), name=f"steps of {self.name}")

    async def _steps(self) -> None:
        while self._state is EngineState.READY and (self._admit() or self._running):
            prefill = self._schedule_prompts()
            decoding = [sequence for sequence in self._running if not sequence.uncomputed]
            stepped = decoding[: self.grant.max_step_tokens]
            seconds = self._times.step_s + self._times.token_s * len(stepped) + self._times.prefill_s * prefill
            began_s = asyncio.get_running_loop().time()
            self._between_steps.clear()
            await self._spend(seconds * self._time_scale)
            self._between_steps.set()
            self._work = self._work.plus(asyncio.get_running_loop().time() - began_s, len(stepped), prefill)
            for sequence in stepped:
                self._generate_token(sequence)
            self._preempt()

    def _schedule_prompts(self) -> int:
        """Take the prompt tokens that the next step has room for, in order of admission. Return how many they are."""
        room = scheduled = max(self._prompt_room, 0)
        for sequence in self._running:
            tokens = min(sequence.uncomputed, room)
            sequence.uncomputed -= tokens
            room -= tokens
        return scheduled - room

    @property
    def _prompt_room(self) -> int:
        """Return the tokens that a step has room for beside those of the sequences that decode."""
        return self.grant.max_step_tokens - sum(not sequence.uncomputed for sequence in self._running)

    async def _spend(self, seconds: float) -> None:
        await self._processor.spend(seconds)

    def _generate_token(self, sequence: _Sequence) -> None:
        """Generate a token of a request, unless the request was aborted or preempted during the step."""
        if sequence not in self._running:
            return
        sequence.generated += 1
        ended = sequence.generated >= len(sequence.pieces)
        if ended or sequence.sent == 0 or sequence.generated - sequence.sent >= sequence.request.stream_interval:
            sequence.chunks.put_nowait(self._chunk(sequence, sequence.generated))
        if ended:
            self._remove(sequence)

    def _admit(self) -> bool:
        """Admit waiting requests while there is room for them. Return True if any request runs."""
        room = self._prompt_room - sum(sequence.uncomputed for sequence in self._running)
        while self._waiting and room > 0 and len(self._running) < self.grant.max_active_seqs:
            sequence = self._waiting[0]
            if self._held(sequence) > self._kv_cache_bytes - self._in_use:
                break
            self._running.append(self._waiting.pop(0))
            room -= sequence.uncomputed
        return bool(self._running)

    def _enqueue(self, sequence: _Sequence) -> None:
        insort(self._waiting, sequence, key=lambda waiting: (waiting.rank, waiting.number))

    def _preempt(self) -> None:
        """Preempt the requests that were admitted last until the others fit, except during a shrink's grace period."""
        while self._shrink is None and len(self._running) > 1 and self._in_use > self._kv_cache_bytes:
            self._preempt_one(self._running.pop())

    def _preempt_all(self) -> int:
        preempted = len(self._running)
        while self._running:
            self._preempt_one(self._running.pop())
        return preempted

    def _preempt_one(self, sequence: _Sequence) -> None:
        sequence.uncomputed = sequence.prompt_tokens + len(sequence.request.resume_tokens) + sequence.generated
        self._enqueue(sequence)
        self._preemptions += 1

    def _held(self, sequence: _Sequence) -> int:
        """Return the bytes of a request's blocks, which cover its tokens and the next one."""
        blocks = -(-(sequence.prompt_tokens + sequence.generated + 1) // self._memory.block_tokens)
        return blocks * self._memory.block_tokens * self._memory.token

    @property
    def _in_use(self) -> int:
        return sum(map(self._held, self._running)) if self._memory.token else 0

    @property
    def _kv_cache_bytes(self) -> int:
        return self._limits.kv_cache_bytes(self.grant.gpu_memory_utilization)

    def _remove(self, sequence: _Sequence) -> None:
        """Remove a request that has ended or was aborted. Its memory may admit another one or settle a shrink."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            return
        if not self._time_scale and self._waiting and self._admit():
            for other in self._running:
                if not other.sent:
                    other.chunks.put_nowait(self._chunk(other, len(other.pieces)))
        if self._shrink and self._in_use <= self._kv_cache_bytes:
            self._settle_shrink(self._applied(self.grant))

    def _check(self) -> None:
        if self._state is not EngineState.READY:
            raise self._dead()

    def _dead(self) -> EngineDead:
        return EngineDead(f"engine {self.name} is {self._state}", self._death)

    @property
    def limits(self) -> EngineLimits:
        if not self._started:
            raise EngineError(f"engine {self.name} is {self._state}: its limits are known only after it has started")
        return self._limits

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        if self._state is not EngineState.READY:
            return Rejected(grant, f"engine {self.name} is {self._state}")
        if violation := self._limits.violation(grant):
            return Rejected(grant, f"engine {self.name}: {violation}")
        if self._times.call_s:
            await self._front.spend(self._times.call_s * self._time_scale)
        if self._stepping and not self._stepping.done():
            await self._between_steps.wait()  # a real engine answers calls between two steps too
        self._settle_shrink(None)
        before, self.grant = self.grant, grant
        self.usage.hold(self._limits.held_bytes(grant.gpu_memory_utilization))
        preempted = self._preempt_all() if grant.preempt else 0
        held = self._in_use - self._kv_cache_bytes
        if held > 0 and grace_s > 0:
            loop = asyncio.get_running_loop()
            deferred = Deferred(grant, held, grace_s, loop.create_future())
            self._shrink = deferred, loop.call_later(grace_s, self._end_grace)
            return deferred
        self._preempt()
        if self._waiting:
            self._begin_steps()
        moved = abs(grant.gpu_memory_utilization - before.gpu_memory_utilization)
        return self._applied(grant, moved, preempted)

    def _end_grace(self) -> None:
        """Preempt the requests that still use memory that the shrink takes away."""
        assert self._shrink is not None
        (deferred, _), self._shrink = self._shrink, None
        before = self._preemptions
        while self._running and self._in_use > self._kv_cache_bytes:
            self._preempt_one(self._running.pop())
        deferred.settled.set_result(self._applied(deferred.grant, preempted=self._preemptions - before))

    def _applied(self, grant: Grant, moved: float = 0, preempted: int = 0) -> Applied:
        kv = self._limits.kv_cache_bytes(grant.gpu_memory_utilization)
        return Applied(grant, kv, int(moved * self._memory.device), 0.0, 0.0, preempted)

    def _settle_shrink(self, outcome: Applied | None) -> None:
        """Settle the deferred shrink, if there is one. None means that a newer grant supersedes it."""
        if self._shrink:
            (deferred, timer), self._shrink = self._shrink, None
            timer.cancel()
            deferred.settled.set_result(outcome or Superseded(deferred.grant))

    def stats(self) -> EngineStats:
        return EngineStats(
            state=self._state,
            grant=self.grant,
            kv_cache_bytes=self._kv_cache_bytes,
            running=len(self._running),
            waiting=len(self._waiting),
            kv_cache_usage=self._in_use / self._kv_cache_bytes,
            preemptions=self._preemptions,
            requests=self._requests,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            work=self._work,
        )

    async def close(self) -> None:
        if self._state is EngineState.READY:
            self._die(Death.CRASHED)  # vLLM fails the requests that still wait for a token in the same way
        self._state = EngineState.CLOSED
        self._settle_shrink(None)
        if self._stepping:
            self._stepping.cancel()


def _token(piece: str) -> int:
    """Return a token id that is always the same for the same piece."""
    return zlib.crc32(piece.encode()) % 50_000
