"""Batches of jobs on fake engines, and the summary of their results."""

import pytest

from runtime.errors import TroupeError
from runtime.jobs.batch import percentile, summarise, work_all
from runtime.jobs.job import Job, JobResult
from runtime.jobs.orchestrator import Orchestrator
from tests.runtime.fakes import embedded_team, engines

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("problem", ["", "5 apples?", "1000+1"])
async def test_refused_problem_does_not_affect_other_jobs(problem: str) -> None:
    results: list[JobResult] = []
    jobs = [Job("good", "1+2", "3"), Job("bad", problem), Job("fine", "2+3", "5")]
    await work_all(Orchestrator(embedded_team(), await engines()), jobs, 2, results.append)
    assert {result.id: result.error is None for result in results} == {"good": True, "bad": False, "fine": True}


async def test_error_while_taking_a_result_stops_the_batch() -> None:
    def full(result: JobResult) -> None:
        raise TroupeError("no space")

    jobs = [Job(str(n), "1+2") for n in range(100)]
    handles = await engines()
    with pytest.raises(TroupeError, match="no space"):
        await work_all(Orchestrator(embedded_team(), handles), jobs, 4, full)
    assert handles["planner"].stats().requests < 100


async def test_summary_counts_correct_answers_and_usage() -> None:
    results: list[JobResult] = []
    jobs = [Job("a", "1+2", "3"), Job("b", "1+2", "4"), Job("c", "x", "4"), Job("d", "1+2")]
    await work_all(Orchestrator(embedded_team(), await engines(time_scale=1)), jobs, 4, results.append)
    summary = summarise(results)
    assert (summary.problems, summary.failed) == (4, 1)
    assert summary.accuracy == pytest.approx(1 / 3)
    assert summary.usage["planner"].completion_tokens == 3 * 4
    assert 0 < summary.job_time_p50_s <= summary.job_time_p99_s


@pytest.mark.parametrize(
    ("count", "percent", "rank"),
    [(1, 50, 1), (1, 99, 1), (2, 50, 1), (4, 50, 2), (100, 90, 90), (100, 99, 99), (10, 99, 10)],
)
def test_percentile_is_the_nearest_rank(count: int, percent: float, rank: int) -> None:
    assert percentile([float(n) for n in range(1, count + 1)], percent) == rank
