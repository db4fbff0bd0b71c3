"""Runs a list of jobs with bounded concurrency, and summarises their results."""

import asyncio
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from runtime.engines.usage import Usage
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import Orchestrator


async def work_all(
    orchestrator: Orchestrator, jobs: Iterable[Job], concurrency: int, take: Callable[[JobResult], None]
) -> None:
    """Run the jobs in order, at most `concurrency` at a time, and call `take` with each result as it comes.

    If `take` raises, the other jobs are cancelled and the error is raised.
    """
    queue = iter(jobs)

    async def worker() -> None:
        for job in queue:  # all workers share the iterator, so each job has one worker
            take(await orchestrator.run(job))

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(worker(), name=f"jobs {number}")
    except BaseExceptionGroup as failures:  # only `take` raises: a job reports its error in its result
        raise failures.exceptions[0] from None


@dataclass(frozen=True)
class Summary:
    """Totals over a batch of results. `accuracy` is None if no answers were expected."""

    problems: int
    failed: int
    unconfirmed: int
    accuracy: float | None
    job_time_p50_s: float
    job_time_p90_s: float
    job_time_p99_s: float
    usage: dict[str, Usage]

    def as_json(self) -> dict[str, object]:
        """Return the summary as JSON."""
        return asdict(self)


def summarise(results: list[JobResult]) -> Summary:
    """Summarise results, of which there must be at least one. Job times leave out jobs that failed."""
    judged = [result.correct for result in results if result.correct is not None]
    answered = [result for result in results if result.error is None]
    times = sorted(result.elapsed_s for result in answered) or [0.0]
    usage: dict[str, Usage] = {}
    for result in results:
        for seat, used in result.usage.items():
            usage.setdefault(seat, Usage()).add(used)
    return Summary(
        problems=len(results),
        failed=len(results) - len(answered),
        unconfirmed=sum(result.confirmed is False for result in answered),
        accuracy=statistics.fmean(judged) if judged else None,
        job_time_p50_s=percentile(times, 50),
        job_time_p90_s=percentile(times, 90),
        job_time_p99_s=percentile(times, 99),
        usage=usage,
    )


def percentile(ordered: list[float], percent: float) -> float:
    """Return the nearest-rank percentile of a sorted list that is not empty."""
    rank = math.ceil(int(percent * len(ordered)) / 100)
    return ordered[max(rank, 1) - 1]
