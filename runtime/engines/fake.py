"""A deterministic engine without a model: replies come from a function, times and memory from a service model.

For tests, for work on workflows and policies, and for simulation on a virtual clock. `time_scale` 0 answers at once; 1
takes the modelled time. The modelled engine works as vLLM does, step by step: a step decodes one token for every
running sequence and computes the prompts of those that were just admitted. Sequences are admitted first come, first
served, while the grant has a place, the step has tokens and the KV cache has blocks for the prompt; a sequence that
outgrows its blocks where none is free preempts the one admitted last, which is computed again later.
"""

import asyncio
import zlib
from bisect import insort
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from runtime.engines.grant import Applied, Deferred, EngineLimits, Grant, Rejected, ResizeOutcome, Superseded
from runtime.engines.handle import EngineHandle, EngineState, EngineStats
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import UsageMeter
from runtime.errors import Death, EngineDead, EngineError

Script = Callable[[GenerateRequest], str]


@dataclass(frozen=True)
class ServiceTime:
    """Seconds: a step takes `step_s`, `token_s` for each sequence that it decodes, `prefill_s` for each prompt token. A
    call from outside, a request's or a resize's, takes `call_s` of the process that it comes from."""

    step_s: float = 0.002
    token_s: float = 0.0001
    prefill_s: float = 0.00005
    call_s: float = 0.0


@dataclass(frozen=True)
class FakeMemory:
    """Bytes: the device, what the engine holds besides its KV cache, its floor, and what a token takes; memory is
    handed out in blocks of `block_tokens` tokens."""

    device: int = 1000
    fixed: int = 100
    floor: int = 50
    token: int = 0
    block_tokens: int = 1


class Processor:
    """What engines compute on together, or calls go through: with more of them than there are `lanes`, all are
    slower."""

    def __init__(self, lanes: float) -> None:
        self._lanes = lanes
        self._busy = 0

    async def spend(self, seconds: float) -> None:
        """Compute for what would be so many seconds alone."""
        self._busy += 1
        try:
            await asyncio.sleep(seconds * max(1.0, self._busy / self._lanes))
        finally:
            self._busy -= 1


@dataclass(eq=False)
class _Sequence:
    """One request in the engine. `computed` is whether its prompt, and what it has written, is in the KV cache."""

    number: int
    rank: int
    request: GenerateRequest
    prompt_tokens: int
    pieces: list[str]
    finish: str
    written: int = 0
    sent: int = 0
    computed: bool = False
    chunks: asyncio.Queue[Chunk | None] = field(default_factory=asyncio.Queue)


class FakeEngine(EngineHandle):
    """Answers `script(request)`, a blank-separated word a token. `kill` ends it from outside, `crash` from inside.

    Tokens are sent on at the first, at the last, and at every `stream_interval`-th of the request between them.
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
        )
        self.grant = grant or Grant(1.0, max_num_seqs, 2048)
        self._processor = processor or Processor(lanes=1e9)
        self._front = front or Processor(lanes=1e9)
        self._state = EngineState.STARTING
        self._started = False
        self._death = Death.CRASHED
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._stepping: asyncio.Task[None] | None = None
        self._between_steps = asyncio.Event()
        self._shrink: tuple[Deferred, asyncio.TimerHandle] | None = None
        self._requests = self._prompt_tokens = self._completion_tokens = self._preemptions = 0

    async def start(self) -> None:
        self._state, self._started = EngineState.READY, True
        self.usage.hold(self._limits.held_bytes(self.grant.gpu_memory_utilization))

    def kill(self) -> None:
        self._die(Death.KILLED)

    def crash(self) -> None:
        """End by itself, as after an error that is fatal in vLLM's worker."""
        self._die(Death.CRASHED)

    def _die(self, death: Death) -> None:
        self._state, self._death = EngineState.DEAD, death
        for sequence in (*self._running, *self._waiting):
            sequence.chunks.put_nowait(None)

    async def pulse(self) -> None:
        self._check()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self._check()
        with self.usage.request(request.rank(asyncio.get_running_loop().time())):
            sequence = self._sequence(request)
            self._check()  # the script may have killed it
            self._requests += 1
            self._prompt_tokens += sequence.prompt_tokens
            if self._times.call_s:
                await self._front.spend(self._times.call_s * self._time_scale)
                self._check()
            self._enqueue(sequence)
            self._begin_steps()
            try:
                if not self._time_scale and not self._waiting:  # all at once: what is measured is the caller
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
                self._let_go(sequence)

    def _sequence(self, request: GenerateRequest) -> _Sequence:
        words = self._script(request).split(" ")
        pieces = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        finish = "length" if request.max_tokens is not None and len(pieces) > request.max_tokens else "stop"
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        if request.prompt is not None:
            prompt_tokens = len(request.prompt.split() if isinstance(request.prompt, str) else request.prompt)
        rank = request.rank(asyncio.get_running_loop().time())
        rest = pieces[len(request.given) : request.max_tokens]
        return _Sequence(self._requests, rank, request, prompt_tokens, rest, finish)

    def _chunk(self, sequence: _Sequence, upto: int) -> Chunk:
        """What was written and not sent yet."""
        pieces = sequence.pieces[sequence.sent : upto]
        self._completion_tokens += len(pieces)
        sequence.sent = upto
        finish = sequence.finish if upto >= len(sequence.pieces) else None
        now_s = asyncio.get_running_loop().time()
        return Chunk("".join(pieces), tuple(map(_token, pieces)), now_s, sequence.prompt_tokens, finish)

    def _begin_steps(self) -> None:
        """Admit what fits; while anything runs, steps follow one another."""
        if not self._time_scale:
            self._admit()
        elif self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._steps(), name=f"steps of {self.name}")

    async def _steps(self) -> None:
        while self._state is EngineState.READY and (self._admit() or self._running):
            prefill = sum(s.prompt_tokens + s.written for s in self._running if not s.computed)
            seconds = self._times.step_s + self._times.token_s * len(self._running) + self._times.prefill_s * prefill
            stepped = list(self._running)
            self._between_steps.clear()
            await self._spend(seconds * self._time_scale)
            self._between_steps.set()
            for sequence in stepped:
                self._write(sequence)
            self._preempt()

    async def _spend(self, seconds: float) -> None:
        await self._processor.spend(seconds)

    def _write(self, sequence: _Sequence) -> None:
        """A token of a sequence, unless it was aborted or preempted meanwhile."""
        if sequence not in self._running:
            return
        sequence.computed = True
        sequence.written += 1
        ended = sequence.written >= len(sequence.pieces)
        if ended or sequence.sent == 0 or sequence.written - sequence.sent >= sequence.request.stream_interval:
            sequence.chunks.put_nowait(self._chunk(sequence, sequence.written))
        if ended:
            self._let_go(sequence)

    def _admit(self) -> bool:
        """Let the first in the queue run while there is a place, tokens in the step, and memory."""
        tokens = len(self._running)
        while self._waiting and len(self._running) < self.grant.max_active_seqs:
            sequence = self._waiting[0]
            tokens += sequence.prompt_tokens + sequence.written
            first = not self._running
            if not first and tokens > self.grant.max_step_tokens:
                break
            if self._held(sequence) > self._kv_cache_bytes - self._in_use:
                break
            self._running.append(self._waiting.pop(0))
        return bool(self._running)

    def _enqueue(self, sequence: _Sequence) -> None:
        insort(self._waiting, sequence, key=lambda waiting: (waiting.rank, waiting.number))

    def _preempt(self) -> None:
        """While what runs needs more than there is, the one admitted last gives way; a shrink under way has its
        grace."""
        while self._shrink is None and len(self._running) > 1 and self._in_use > self._kv_cache_bytes:
            self._give_way(self._running.pop())

    def _give_way(self, sequence: _Sequence) -> None:
        sequence.computed = False
        self._enqueue(sequence)
        self._preemptions += 1

    def _held(self, sequence: _Sequence) -> int:
        """Bytes: whole blocks for what is computed and the next token."""
        blocks = -(-(sequence.prompt_tokens + sequence.written + 1) // self._memory.block_tokens)
        return blocks * self._memory.block_tokens * self._memory.token

    @property
    def _in_use(self) -> int:
        return sum(map(self._held, self._running)) if self._memory.token else 0

    @property
    def _kv_cache_bytes(self) -> int:
        return self._limits.kv_cache_bytes(self.grant.gpu_memory_utilization)

    def _let_go(self, sequence: _Sequence) -> None:
        """A sequence has ended or was aborted: its memory may be what the next, or a shrink, waits for."""
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
        self._moved()

    def _moved(self) -> None:
        if self._shrink and self._in_use <= self._kv_cache_bytes:
            self._settle(self._applied(self.grant))

    def _check(self) -> None:
        if self._state is not EngineState.READY:
            raise self._dead()

    def _dead(self) -> EngineDead:
        return EngineDead(f"engine {self.name} is {self._state}", self._death)

    @property
    def limits(self) -> EngineLimits:
        if not self._started:
            raise EngineError(f"engine {self.name} is {self._state}: what it can be granted is not known yet")
        return self._limits

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        if self._state is not EngineState.READY:
            return Rejected(grant, f"engine {self.name} is {self._state}")
        if complaint := self._limits.complaint(grant):
            return Rejected(grant, f"engine {self.name}: {complaint}")
        if self._times.call_s:
            await self._front.spend(self._times.call_s * self._time_scale)
        if self._stepping and not self._stepping.done():
            await self._between_steps.wait()  # as calls of a real one are answered between two of its steps
        self._settle(None)
        before, self.grant = self.grant, grant
        self.usage.hold(self._limits.held_bytes(grant.gpu_memory_utilization))
        held = self._in_use - self._kv_cache_bytes
        if held > 0 and grace_s > 0:
            loop = asyncio.get_running_loop()
            deferred = Deferred(grant, held, grace_s, loop.create_future())
            self._shrink = deferred, loop.call_later(grace_s, self._end_grace)
            return deferred
        self._preempt()
        if self._waiting:
            self._begin_steps()
        return self._applied(grant, moved=abs(grant.gpu_memory_utilization - before.gpu_memory_utilization))

    def _end_grace(self) -> None:
        """Whoever still uses what is to go gives way."""
        assert self._shrink is not None
        (deferred, _), self._shrink = self._shrink, None
        before = self._preemptions
        while self._running and self._in_use > self._kv_cache_bytes:
            self._give_way(self._running.pop())
        deferred.settled.set_result(self._applied(deferred.grant, preempted=self._preemptions - before))

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
        )

    async def close(self) -> None:
        if self._state is EngineState.READY:
            self._die(Death.CRASHED)  # as vLLM tells those that still wait for a token
        self._state = EngineState.CLOSED
        self._settle(None)
        if self._stepping:
            self._stepping.cancel()


def _token(piece: str) -> int:
    """A token's id: the same piece, the same id."""
    return zlib.crc32(piece.encode()) % 50_000
