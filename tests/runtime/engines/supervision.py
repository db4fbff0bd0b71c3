"""An engine under supervision whose process dies, hangs or does not start."""

import asyncio
from dataclasses import dataclass, field, replace

from agents.role import Message
from runtime.engines.fake import FakeEngine, ServiceTime, _Sequence
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState
from runtime.engines.replicas import Replicas
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.supervised import Patience
from runtime.errors import EngineError, RequestRefused

WORDS = "one two three four five six seven eight"
REQUEST = GenerateRequest("r", (Message("user", "go on"),), 0.0, 1.0, 100)
POISON = replace(REQUEST, messages=(Message("user", "poison"),))
LATE_POISON = replace(REQUEST, messages=(Message("user", "late poison"),), stream_interval=64)
"""It crashes an engine at the sixth token of its reply. It is streamed as jobs are: the first token, then the rest."""
ERRS_LATE = replace(REQUEST, messages=(Message("user", "err late"),))
"""It crashes an engine one step after the first token of its reply, and the engine loses that token."""
LONG = replace(REQUEST, messages=(Message("user", "long"),))
LONG_WORDS = " ".join([WORDS] * 12)
QUICK = Patience(hang_s=0.2, pulse_every_s=0.02, backoff_s=(0, 0.01), restarts=4, within_s=60)


class Hanging(FakeEngine):
    """An engine that gives no token and no pulse while `hangs` is set."""

    hangs = False
    fails_to_start = False
    crashes_next_step = False

    async def start(self) -> None:
        if self.fails_to_start:
            raise EngineError("no memory left")
        await super().start()

    async def pulse(self) -> None:
        while self.hangs:
            await asyncio.sleep(0.01)
            self._check()
        await super().pulse()

    async def _spend(self, seconds: float) -> None:
        while self.hangs:
            await asyncio.sleep(0.01)
            self._check()
        await super()._spend(seconds)
        if self.crashes_next_step:
            self.crash()

    def _generate_token(self, sequence: _Sequence) -> None:
        tokens = len(sequence.request.resume_tokens) + sequence.generated + 1
        if sequence.request.messages == LATE_POISON.messages and tokens == 6:
            self.crash()
        elif sequence.request.messages == ERRS_LATE.messages:
            self.crashes_next_step = True
            sequence.sent = sequence.generated = sequence.generated + 1
            if sequence.generated == sequence.request.max_tokens:
                self._remove(sequence)
                sequence.chunks.put_nowait(replace(self._chunk(sequence, sequence.generated), finish="length"))
        else:
            super()._generate_token(sequence)


@dataclass
class Made:
    """What the supervisor did: the engines that it made, their first grants, the requests, and the reported states.

    The first `fail_to_start` restarts fail. With `drift`, restarted engines reply differently.
    """

    engines: list[Hanging] = field(default_factory=list)
    grants: list[Grant | None] = field(default_factory=list)
    states: list[EngineState] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    fail_to_start: int = 0
    drift: bool = False

    def make(self, grant: Grant | None) -> Hanging:
        number = len(self.engines)

        def script(request: GenerateRequest) -> str:
            self.requests.append(request)
            if request.max_tokens and request.sampling_params.get("min_tokens", 0) > request.max_tokens:
                raise RequestRefused("min_tokens: must be at most max_tokens")  # as vLLM does
            match request.messages[0].content:
                case "poison":
                    self.engines[-1].crash()
                case "kill":
                    self.engines[-1].kill()
                case "hang":
                    self.engines[-1].hangs = True
            words = LONG_WORDS if request.messages == LONG.messages else WORDS
            return words.replace("two", "zwei") if self.drift and number else words

        engine = Hanging("e", script, times=ServiceTime(step_s=0.01, token_s=0), time_scale=1, grant=grant)
        engine.fails_to_start = 0 < number <= self.fail_to_start
        self.engines.append(engine)
        self.grants.append(grant)
        return engine


async def reply(engine: Replicas, request: GenerateRequest = REQUEST) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
