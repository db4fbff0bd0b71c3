"""Play a drawn workload once: start each job at its arrival time, and record its result and its calls."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, cycle, pairwise

from runtime.bench.results import CallRow
from runtime.bench.workload import Arrival, ClosedPhase, Schedule
from runtime.events import CallEnded, Event
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import Orchestrator


@dataclass(frozen=True)
class Played:
    """One ended job. Times are in seconds from the start of the play."""

    phase: str
    arrived_s: float
    ended_s: float
    result: JobResult
    calls: tuple[CallRow, ...]


@dataclass
class Player:
    """One play of a workload.

    `orchestrators` maps each phase to the orchestrator that runs its jobs; `on_event` must listen to their events.
    `take` gets each ended job. Job ids start with `name`.
    """

    orchestrators: Mapping[str, Orchestrator]
    name: str
    take: Callable[[Played], None]
    _calls: dict[str, list[CallRow]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)
    _started_s: float = 0.0

    async def play(self, schedule: Schedule) -> float:
        """Play until the last job has ended, and return the duration in seconds. Cancelling it cancels the jobs."""
        clock = asyncio.get_running_loop().time
        self._started_s = clock()
        async with asyncio.TaskGroup() as group:
            for phase in schedule.closed:
                group.create_task(self._closed(phase), name=f"{self.name} {phase.phase}")
            for arrival in schedule.arrivals:
                await asyncio.sleep(max(self._started_s + arrival.at_s - clock(), 0))
                group.create_task(self._job(arrival), name=f"{self.name} job")
        return clock() - self._started_s

    def on_event(self, event: Event) -> None:
        """Record an ended call if it belongs to a job of this play."""
        if isinstance(event, CallEnded) and event.job in self._calls:
            self._calls[event.job].append(call_row(event, self._started_s))

    async def _closed(self, phase: ClosedPhase) -> None:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(phase.at_s)
        problems = cycle(phase.problems)

        async def worker() -> None:
            while (at_s := clock() - self._started_s) < phase.at_s + phase.seconds:
                await self._job(Arrival(at_s, phase.phase, next(problems)))

        async with asyncio.TaskGroup() as group:
            for number in range(phase.concurrency):
                group.create_task(worker(), name=f"{self.name} {phase.phase} {number}")

    async def _job(self, arrival: Arrival) -> None:
        problem = arrival.problem
        job = Job(f"{self.name}/{next(self._numbers)}", problem.problem, problem.expected, compare=problem.compare)
        calls = self._calls.setdefault(job.id, [])
        try:
            result = await self.orchestrators[arrival.phase].run(job)
        finally:
            del self._calls[job.id]
        ended_s = asyncio.get_running_loop().time() - self._started_s
        self.take(Played(arrival.phase, arrival.at_s, ended_s, result, tuple(calls)))


def call_row(call: CallEnded, started_s: float) -> CallRow:
    """Return the timings of one call.

    The definitions are those of `vllm bench serve` (calculate_metrics in vllm/benchmarks/serve.py and
    lib/endpoint_request_func.py): TPOT is (E2EL - TTFT) / (tokens - 1), and ITL has one value for each message after
    the first, however many tokens it carries.
    """
    times = call.chunk_times_s or (call.asked_s,)
    tokens = sum(call.chunk_tokens)
    return CallRow(
        seat=call.seat,
        asked_s=call.asked_s - started_s,
        ttft_s=times[0] - call.asked_s,
        e2el_s=times[-1] - call.asked_s,
        tpot_s=(times[-1] - times[0]) / (tokens - 1) if tokens > 1 else 0.0,
        itl_s=tuple(round(later - earlier, 6) for earlier, later in pairwise(times)),
        prompt_tokens=call.prompt_tokens,
        completion_tokens=tokens,
    )
