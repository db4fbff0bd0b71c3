"""Fit the constants of the request-level model to running engines: the time of a step by its number of sequences, and
how much engines slow each other down.

The calls are recorded from jobs of the team. Each engine then answers them with 1, 2, 4, ... sequences at a time.
"""

import asyncio
import statistics
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count, cycle, islice

from runtime.engines.handle import EngineHandle
from runtime.engines.request import Chunk, Engine, GenerateRequest
from runtime.jobs.batch import work_all
from runtime.jobs.job import Job
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.team import Team
from runtime.simulation.load import EngineModel, Model

CALLS = 8
"""Calls for each concurrent sequence, enough that starting up and running out take a small part of the time."""


@dataclass(frozen=True)
class Measurement:
    """An engine with a constant number of sequences: its calls and tokens a second, and the seconds of one step."""

    engine: str
    sequences: int
    calls_per_s: float
    tokens_per_s: float
    step_s: float


class Recording:
    """An engine that records the requests which it passes on to another."""

    def __init__(self, engine: Engine) -> None:
        self.requests: list[GenerateRequest] = []
        self._engine = engine

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        return self._engine.generate(request)


async def fit(
    team: Team, engines: Mapping[str, EngineHandle], jobs: Sequence[Job], progress: Callable[[str], None]
) -> tuple[Model, list[Measurement]]:
    """Return the fitted model, and the measurements that it was fitted to.

    Each engine must have memory for as many sequences as it may run at once.
    """
    requests = await record(team, engines, jobs)
    measurements: list[Measurement] = []
    fitted: dict[str, EngineModel] = {}
    for name, engine in engines.items():
        of_engine = []
        for sequences in _powers_of_two(engine.limits.seqs_ceiling):
            progress(f"{name}, {sequences} at a time")
            of_engine.append(await _measure(engine, requests[name], sequences))
        measurements += of_engine
        fitted[name] = _engine_model(engine, of_engine)
    progress("all engines at once")
    lanes = await _lanes(engines, requests, measurements)
    call_s = {name: await _call_s(engine, requests[name]) for name, engine in engines.items()}
    models = {name: model.model_copy(update={"call_s": call_s[name]}) for name, model in fitted.items()}
    return Model(lanes=lanes, engines=models), measurements


async def record(
    team: Team, engines: Mapping[str, EngineHandle], jobs: Sequence[Job]
) -> Mapping[str, list[GenerateRequest]]:
    """Return the requests that a team sends to each engine while it works the jobs."""
    recording = {name: Recording(engine) for name, engine in engines.items()}
    orchestrator = Orchestrator(team, recording, stream_interval=1)  # as in a benchmark, whose times the model predicts
    await work_all(orchestrator, jobs, 16, lambda result: None)
    return {name: engine.requests for name, engine in recording.items()}


async def _measure(engine: EngineHandle, requests: Sequence[GenerateRequest], sequences: int) -> Measurement:
    """Measure an engine that always has the given number of calls until they run out."""
    numbers = count()
    calls = sequences * CALLS if sequences > 2 else 16
    pending = islice(cycle(requests), calls)
    tokens = 0

    async def worker() -> None:
        nonlocal tokens
        for request in pending:
            again = replace(request, request_id=f"fit-{sequences}-{next(numbers)}-{id(pending)}")
            async with aclosing(engine.generate(again)) as chunks:
                async for chunk in chunks:
                    tokens += len(chunk.token_ids)

    clock = asyncio.get_running_loop().time
    started = clock()
    await asyncio.gather(*(worker() for _ in range(sequences)))
    seconds = clock() - started
    return Measurement(engine.name, sequences, calls / seconds, tokens / seconds, sequences * seconds / tokens)


def _engine_model(engine: EngineHandle, measurements: Sequence[Measurement]) -> EngineModel:
    """Fit a line to step times over sequences.

    Least squares of the relative error: few sequences then count as much as many.
    """
    weights = [1 / measured.step_s**2 for measured in measurements]
    mean_n = _mean([float(measured.sequences) for measured in measurements], weights)
    mean_s = _mean([measured.step_s for measured in measurements], weights)
    covariance = _mean([(m.sequences - mean_n) * (m.step_s - mean_s) for m in measurements], weights)
    variance = _mean([(m.sequences - mean_n) ** 2 for m in measurements], weights)
    token_s = max(covariance / variance, 0.0) if variance else 0.0
    limits = engine.limits
    return EngineModel(
        step_s=max(mean_s - token_s * mean_n, 1e-6),
        token_s=token_s,
        block_bytes=limits.block_bytes,
        block_tokens=limits.block_tokens,
        max_num_seqs=limits.seqs_ceiling,
    )


async def _lanes(
    engines: Mapping[str, EngineHandle],
    requests: Mapping[str, list[GenerateRequest]],
    measurements: Sequence[Measurement],
) -> float:
    """Return how many engines can run at full speed at once.

    This is the sum over the engines of the speed beside the others, divided by the speed alone.
    """
    lanes = []
    for sequences in (8, 32):
        alone = {m.engine: m.tokens_per_s for m in measurements if m.sequences == sequences}
        if len(alone) < len(engines):
            continue
        together = await asyncio.gather(
            *(_measure(engine, requests[name] * 2, sequences) for name, engine in engines.items())
        )
        lanes.append(sum(m.tokens_per_s / alone[m.engine] for m in together))
    return statistics.fmean(lanes) if lanes else float(len(engines))


async def _call_s(engine: EngineHandle, requests: Sequence[GenerateRequest]) -> float:
    """Return the seconds that a call spends on the way to a busy engine and back.

    A pulse takes this time and, on average, half a step.
    """
    load = asyncio.create_task(_measure(engine, requests, 16), name=f"load on {engine.name}")
    clock = asyncio.get_running_loop().time
    pulses_s = []
    while not load.done():
        started = clock()
        await engine.pulse()
        pulses_s.append(clock() - started)
        await asyncio.sleep(0.01)
    return max(statistics.median(pulses_s) - (await load).step_s / 2, 0.0)


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
