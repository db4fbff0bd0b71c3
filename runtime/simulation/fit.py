"""Fits the constants of the request-level model to engines that run: how long their steps take with so many sequences
in them, and how much engines slow each other.

The calls are those that the team makes, recorded from jobs; each engine answers them with 1, 2, 4, ... at a time.
"""

import asyncio
import statistics
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count, cycle, islice

from runtime.engines.grant import EngineLimits, Grant, ResizeOutcome
from runtime.engines.handle import EngineHandle, EngineStats
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.usage import UsageMeter
from runtime.jobs.batch import work_all
from runtime.jobs.job import Job
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.team import Team
from runtime.simulation.load import EngineModel, Model

CALLS = 8
"""Calls for each sequence at a time: beginning and end are then a small part of it."""


@dataclass(frozen=True)
class Seen:
    """An engine with so many sequences at all times: calls and tokens a second, and seconds of one of its steps."""

    engine: str
    sequences: int
    calls_per_s: float
    tokens_per_s: float
    step_s: float


class Recording(EngineHandle):
    """Passes calls on and keeps them."""

    def __init__(self, engine: EngineHandle) -> None:
        self.name = engine.name
        self.usage: UsageMeter = engine.usage
        self.requests: list[GenerateRequest] = []
        self._engine = engine

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        return self._engine.generate(request)

    @property
    def limits(self) -> EngineLimits:
        return self._engine.limits

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def resize(self, grant: Grant, grace_s: float = 0) -> ResizeOutcome:
        return await self._engine.resize(grant, grace_s)

    async def start(self) -> None:
        await self._engine.start()

    async def pulse(self) -> None:
        await self._engine.pulse()

    def kill(self) -> None:
        self._engine.kill()

    async def close(self) -> None:
        await self._engine.close()


async def fit(
    team: Team, engines: Mapping[str, EngineHandle], jobs: Sequence[Job], progress: Callable[[str], None]
) -> tuple[Model, list[Seen]]:
    """The model, and what it was fitted to. Engines must have memory for all that they may run at once."""
    requests = await _record(team, engines, jobs)
    seen: list[Seen] = []
    fitted: dict[str, EngineModel] = {}
    for name, engine in engines.items():
        mine = []
        for sequences in _powers_of_two(engine.limits.seqs_ceiling):
            progress(f"{name}, {sequences} at a time")
            mine.append(await _measure(engine, requests[name], sequences))
        seen += mine
        fitted[name] = _engine_model(engine, mine)
    progress("all at once")
    lanes = await _lanes(engines, requests, seen)
    call_s = {name: await _call_s(engine, requests[name]) for name, engine in engines.items()}
    models = {name: model.model_copy(update={"call_s": call_s[name]}) for name, model in fitted.items()}
    return Model(lanes=lanes, engines=models), seen


async def _record(
    team: Team, engines: Mapping[str, EngineHandle], jobs: Sequence[Job]
) -> Mapping[str, list[GenerateRequest]]:
    recording = {name: Recording(engine) for name, engine in engines.items()}
    orchestrator = Orchestrator(team, recording, stream_interval=1)  # as in a benchmark, which the model predicts
    await work_all(orchestrator, jobs, 16, lambda result: None)
    return {name: engine.requests for name, engine in recording.items()}


async def _measure(engine: EngineHandle, requests: Sequence[GenerateRequest], sequences: int) -> Seen:
    """Answer calls with so many at all times."""
    numbers = count()
    calls = sequences * CALLS if sequences > 2 else 16
    due = iter(list(islice(cycle(requests), calls)))
    tokens = 0

    async def worker() -> None:
        nonlocal tokens
        for request in due:
            again = replace(request, request_id=f"fit-{sequences}-{next(numbers)}-{id(due)}")
            async with aclosing(engine.generate(again)) as chunks:
                async for chunk in chunks:
                    tokens += len(chunk.token_ids)

    clock = asyncio.get_running_loop().time
    started = clock()
    await asyncio.gather(*(worker() for _ in range(sequences)))
    seconds = clock() - started
    return Seen(engine.name, sequences, calls / seconds, tokens / seconds, sequences * seconds / tokens)


def _engine_model(engine: EngineHandle, seen: Sequence[Seen]) -> EngineModel:
    """Step time over sequences by least squares of the relative error, so that few sequences count as much as many."""
    weights = [1 / one.step_s**2 for one in seen]
    mean_n = _mean([float(one.sequences) for one in seen], weights)
    mean_t = _mean([one.step_s for one in seen], weights)
    covariance = _mean([(one.sequences - mean_n) * (one.step_s - mean_t) for one in seen], weights)
    variance = _mean([(one.sequences - mean_n) ** 2 for one in seen], weights)
    each_s = max(covariance / variance, 0.0) if variance else 0.0
    limits = engine.limits
    return EngineModel(
        step_s=max(mean_t - each_s * mean_n, 1e-6),
        token_s=each_s,
        block_bytes=limits.block_bytes,
        block_tokens=limits.block_tokens,
        max_num_seqs=limits.seqs_ceiling,
    )


async def _lanes(
    engines: Mapping[str, EngineHandle], requests: Mapping[str, list[GenerateRequest]], seen: Sequence[Seen]
) -> float:
    """How many engines run at full speed at once: the sum of their speeds beside each other, each to its own alone."""
    found = []
    for sequences in (8, 32):
        alone = {one.engine: one.tokens_per_s for one in seen if one.sequences == sequences}
        if len(alone) < len(engines):
            continue
        beside = await asyncio.gather(
            *(_measure(engine, requests[name] * 2, sequences) for name, engine in engines.items())
        )
        found.append(sum(one.tokens_per_s / alone[one.engine] for one in beside))
    return statistics.fmean(found) if found else float(len(engines))


async def _call_s(engine: EngineHandle, requests: Sequence[GenerateRequest]) -> float:
    """Seconds that a call takes on its way while the engine works: what a pulse takes beyond half a step."""
    working = asyncio.create_task(_measure(engine, requests, 16))
    clock = asyncio.get_running_loop().time
    found = []
    while not working.done():
        started = clock()
        await engine.pulse()
        found.append(clock() - started)
        await asyncio.sleep(0.01)
    return max(statistics.median(found) - (await working).step_s / 2, 0.0)


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
