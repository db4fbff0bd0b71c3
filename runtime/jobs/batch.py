"""Many jobs at a time, and what they come to: rate, accuracy, job times, tokens."""

import asyncio
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from runtime.engines.usage import Usage
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import Orchestrator


async def work_all(
    orchestrator: Orchestrator, jobs: Iterable[Job], concurrency: int, take: Callable[[JobResult], None]
) -> None:
    """Work the jobs in order, at most `concurrency` at once; `take` gets each result as it comes.

    What `take` raises ends the work and is raised.
    """
    queue = iter(jobs)

    async def worker() -> None:
        for job in queue:  # one iterator for all workers: each takes the next job that nobody has
            take(await orchestrator.run(job))

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(worker(), name=f"jobs {number}")
    except BaseExceptionGroup as failures:  # what `take` raised; the jobs themselves raise nothing
        raise failures.exceptions[0] from None


@dataclass(frozen=True)
class Summary:
    """What a batch came to. Times are seconds; `accuracy` None where no answers were expected."""

    problems: int
    failed: int
    unconfirmed: int
    accuracy: float | None
    job_time_p50_s: float
    job_time_p90_s: float
    job_time_p99_s: float
    usage: dict[str, Usage]

    def as_json(self) -> dict[str, object]:
        """The form in which a summary is printed."""
        return asdict(self)


def summarise(results: list[JobResult]) -> Summary:
    """The summary of at least one result."""
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
    """The nearest-rank percentile of an ordered, non-empty list."""
    return ordered[min(len(ordered) - 1, max(0, -(-int(percent * len(ordered)) // 100) - 1))]
