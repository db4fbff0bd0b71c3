"""Every accepted job ends once, through failures, cancellations, restarts and kills. Fake engines, a real journal."""

import asyncio
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agents.workflow import Unusable
from runtime.config import Service
from runtime.engines.fake import FakeEngine, ServiceTime
from runtime.engines.replicas import Replicas
from runtime.engines.request import Engine, GenerateRequest
from runtime.engines.supervised import SupervisedEngine
from runtime.engines.usage import Usage
from runtime.errors import Busy, EngineError, InputError, JournalError, NotFound
from runtime.jobs.job import Job, JobResult, JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.database import Connection
from runtime.jobs.journal.journal import Journal
from runtime.jobs.journal.records import JobEvent, JobRecord, StartedJob
from runtime.jobs.journal.transaction import Transaction, open_transaction
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.service import JobService
from runtime.jobs.submission import Submission
from tests.runtime.fakes import embedded_team, engines

PROBLEM = Submission(problem="(12+7)*3-(45-5)", expected="17")
STEPS = 9
"""Replies that a team needs for PROBLEM."""


@asynccontextmanager
async def service(
    folder: Path, handles: Mapping[str, Engine] | None = None, settings: Service | None = None
) -> AsyncIterator[JobService]:
    team = embedded_team()
    async with JobService(folder / "jobs.db", team, settings) as jobs:
        jobs.use(Orchestrator(team, handles or await engines(), jobs.on_event))
        yield jobs


async def wait_for_end(jobs: JobService, id: str) -> JobRecord:
    async with asyncio.timeout(60):
        async for _ in jobs.events.follow_job(id):
            pass
    record = await jobs.get(id)
    assert record is not None
    return record


async def wait_for_start(jobs: JobService, id: str) -> None:
    """Wait until a job is RUNNING in the journal."""
    async with asyncio.timeout(60):
        async for event in jobs.events.follow_job(id):
            if event.kind == "running":
                return


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  there is no event to wait for
            await asyncio.sleep(0.01)


async def replies(jobs: JobService) -> int:
    """Count the replies that the journal has."""
    events = await jobs.journal.read(partial(queries.events, limit=10**6))
    return sum(event.kind == "replied" for event in events)


class Counting:
    """Counts the requests to engines, and holds or fails some of them.

    While `go` is not set, requests wait; it is cleared once `hold_after` requests were made. Once `failing_after`
    requests were made, the next `failures` requests fail.
    """

    def __init__(self, handles: Mapping[str, Engine]) -> None:
        self.requests = 0
        self.failures = self.failing_after = 0
        self.hold_after = 10**9
        self.go = asyncio.Event()
        self.go.set()
        for handle in handles.values():
            handle.generate = partial(self._generate, handle.generate)  # type: ignore[method-assign]

    async def _generate(self, generate, request: GenerateRequest):  # type: ignore[no-untyped-def]
        if self.requests >= self.hold_after:
            self.go.clear()
        await self.go.wait()
        if self.failures and self.requests >= self.failing_after:
            self.failures -= 1
            raise EngineError("the engine failed")
        self.requests += 1
        async for chunk in generate(request):
            yield chunk


async def test_job_is_accepted_worked_and_stored(tmp_path: Path) -> None:
    async with service(tmp_path) as jobs:
        record, new = await jobs.submit(PROBLEM)
        assert new
        kinds = [event.kind async for event in jobs.events.follow_job(record.id)]
        assert kinds == ["queued", "running", *["replied"] * STEPS, "done"]
        record = await wait_for_end(jobs, record.id)
        assert (record.state, record.attempts) == (JobState.DONE, 1)
        assert record.result is not None
        assert (record.result["answer"], record.result["correct"], len(record.result["steps"])) == ("17", True, STEPS)
        assert record.submitted_at <= record.started_at <= record.ended_at  # type: ignore[operator]


async def test_submissions_with_the_same_key_are_one_job(tmp_path: Path) -> None:
    submission = PROBLEM.model_copy(update={"idempotency_key": "k"})
    async with service(tmp_path) as jobs:
        (first, new), (second, also_new) = await asyncio.gather(jobs.submit(submission), jobs.submit(submission))
        assert (first.id, {new, also_new}) == (second.id, {True, False})
        assert (await wait_for_end(jobs, first.id)).state is JobState.DONE
        late, new = await jobs.submit(submission)
        assert (late.id, late.state, new) == (first.id, JobState.DONE, False)
        with pytest.raises(InputError, match=f"idempotency_key: 'k' was used for another submission .job {first.id}"):
            await jobs.submit(submission.model_copy(update={"problem": "1+1"}))


async def test_problem_that_the_team_cannot_work_is_refused_and_not_stored(tmp_path: Path) -> None:
    async with service(tmp_path) as jobs:
        with pytest.raises(InputError, match="1000"):
            await jobs.submit(Submission(problem="1000+1"))
        assert await jobs.journal.read(queries.jobs) == []


async def test_full_queue_refuses_new_jobs_and_finds_known_keys(tmp_path: Path) -> None:
    submission = PROBLEM.model_copy(update={"idempotency_key": "k"})
    team = embedded_team()
    async with JobService(tmp_path / "jobs.db", team, Service(queue_max=3)) as jobs:
        first, _ = await jobs.submit(submission)
        outcomes = await asyncio.gather(*(jobs.submit(PROBLEM) for _ in range(10)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [tuple] * 2 + [Busy] * 8
        with pytest.raises(Busy, match=r"the queue is full: 3 jobs wait \(service\.queue_max\); try again later"):
            await jobs.submit(PROBLEM)
        assert (await jobs.submit(submission))[0].id == first.id
        jobs.use(Orchestrator(team, await engines(), jobs.on_event))
        assert (await wait_for_end(jobs, first.id)).state is JobState.DONE
        assert (await jobs.submit(PROBLEM))[1]


async def test_jobs_start_in_order_of_priority(tmp_path: Path) -> None:
    team = embedded_team()
    async with JobService(tmp_path / "jobs.db", team, Service(jobs_at_once=1)) as jobs:
        ids = {p: (await jobs.submit(PROBLEM.model_copy(update={"priority": p})))[0].id for p in (5, 9, 1, 7)}
        jobs.use(Orchestrator(team, await engines(), jobs.on_event))
        for id in ids.values():
            await wait_for_end(jobs, id)
        started = [e.job for e in await jobs.journal.read(queries.events) if e.kind == "running"]
        assert started == [ids[p] for p in (1, 5, 7, 9)]


async def test_cancel_ends_running_and_queued_jobs(tmp_path: Path) -> None:
    handles = await engines()
    counting = Counting(handles)
    counting.go.clear()
    async with service(tmp_path, handles, Service(jobs_at_once=1)) as jobs:
        running, _ = await jobs.submit(PROBLEM)
        waiting, _ = await jobs.submit(PROBLEM)
        last, _ = await jobs.submit(PROBLEM)
        await wait_for_start(jobs, running.id)
        for id in (waiting.id, running.id):
            assert (await jobs.cancel(id)).state is JobState.CANCELLED
        counting.go.set()
        assert (await wait_for_end(jobs, last.id)).state is JobState.DONE
        assert (counting.requests, jobs.counts) == (STEPS, {JobState.QUEUED: 0, JobState.RUNNING: 0})
        assert (await jobs.cancel(last.id)).state is JobState.DONE  # it had already ended
        with pytest.raises(NotFound, match="there is no job 'no such job'"):
            await jobs.cancel("no such job")


async def test_job_that_is_cancelled_as_it_starts_gives_its_place_to_the_next(tmp_path: Path) -> None:
    team = embedded_team()
    async with JobService(tmp_path / "jobs.db", team, Service(jobs_at_once=1)) as jobs:
        first, _ = await jobs.submit(PROBLEM)
        second, _ = await jobs.submit(PROBLEM)
        jobs.use(Orchestrator(team, await engines(), jobs.on_event))
        jobs._on_commit([JobEvent(1000, first.id, 0, JobState.CANCELLED, {})])  # before the job's task has begun
        await wait_until(lambda: not any(jobs.counts.values()))
        assert (await wait_for_end(jobs, second.id)).state is JobState.DONE


async def test_cancel_from_another_process_stops_the_job(tmp_path: Path) -> None:
    handles = await engines()
    Counting(handles).go.clear()
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        with open_transaction(tmp_path / "jobs.db") as elsewhere:
            elsewhere.move(record.id, JobState.CANCELLED)
        assert (await wait_for_end(jobs, record.id)).state is JobState.CANCELLED
        await wait_until(lambda: not jobs.counts[JobState.RUNNING])


@pytest.mark.parametrize("limit", ["deadline_s", "time_s"])
async def test_running_job_expires_at_its_limit(tmp_path: Path, limit: str) -> None:
    handles = await engines()
    Counting(handles).go.clear()
    async with service(tmp_path, handles, Service(jobs_at_once=1)) as jobs:
        blocking, _ = await jobs.submit(PROBLEM.model_copy(update={limit: 0.2}))
        record = await wait_for_end(jobs, blocking.id)
        assert record.state is JobState.EXPIRED
        assert (record.ended_at or 0) - record.submitted_at > 0.15


async def test_queued_job_expires_at_its_deadline(tmp_path: Path) -> None:
    async with JobService(tmp_path / "jobs.db", embedded_team()) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"deadline_s": 0.05}))
        assert (await wait_for_end(jobs, record.id)).state is JobState.EXPIRED
        assert jobs.counts[JobState.QUEUED] == 0


async def test_job_makes_no_call_beyond_its_token_budget(tmp_path: Path) -> None:
    handles = await engines()
    counting = Counting(handles)
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"max_tokens": 30}))
        record = await wait_for_end(jobs, record.id)
        assert record.state is JobState.FAILED
        assert record.result is not None
        assert "tokens; its max_tokens is 30" in record.result["error"]
        assert 0 < counting.requests < STEPS


async def test_retry_after_an_engine_error_resumes_from_the_last_reply(tmp_path: Path) -> None:
    handles = await engines()
    counting = Counting(handles)
    counting.failures, counting.failing_after = 1, 4
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        record = await wait_for_end(jobs, record.id)
        assert (record.state, record.attempts) == (JobState.DONE, 2)
        assert record.result is not None
        assert (record.result["answer"], len(record.result["steps"])) == ("17", STEPS)
        assert counting.requests == STEPS


async def test_jobs_that_are_tried_again_at_the_same_moment_stay_in_hand(tmp_path: Path) -> None:
    class Failing:
        """An orchestrator whose jobs fail together at their first try, and then run until they are cancelled."""

        def __init__(self) -> None:
            self.tries: Counter[str] = Counter()
            self.running: set[str] = set()
            self.fail = asyncio.Event()

        async def run(self, job: Job, *others: Any) -> JobResult:
            self.tries[job.id] += 1
            if self.tries[job.id] == 1:
                await self.fail.wait()
                return JobResult(job.id, job.problem, None, error="the engine died", transient=True)
            self.running.add(job.id)
            try:
                await asyncio.Event().wait()
            finally:
                self.running.discard(job.id)
            raise AssertionError

    orchestrator: Any = Failing()
    async with JobService(tmp_path / "jobs.db", embedded_team()) as jobs:
        jobs.use(orchestrator)
        ids = [(await jobs.submit(PROBLEM))[0].id for _ in range(8)]
        await wait_until(lambda: len(orchestrator.tries) == 8)
        orchestrator.fail.set()
        await wait_until(lambda: len(orchestrator.running) == 8)
        for id in ids:
            await jobs.cancel(id)
        await wait_until(lambda: not orchestrator.running)


async def test_job_fails_after_its_last_retry(tmp_path: Path) -> None:
    handles = await engines()
    Counting(handles).failures = 100
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"retries": 1}))
        record = await wait_for_end(jobs, record.id)
        assert (record.state, record.attempts) == (JobState.FAILED, 2)
        assert record.result is not None
        assert record.result["error"] == "the engine failed"


async def test_internal_error_fails_one_job_only(tmp_path: Path) -> None:
    handles = await engines()
    solver = handles.pop("solver")
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        record = await wait_for_end(jobs, record.id)
        assert record.state is JobState.FAILED
        assert record.result is not None
        assert "internal error" in record.result["error"]
        handles["solver"] = solver
        assert (await wait_for_end(jobs, (await jobs.submit(PROBLEM))[0].id)).state is JobState.DONE


async def test_restart_resumes_a_job_from_its_last_reply(tmp_path: Path) -> None:
    """Stop after each possible number of replies. No call is repeated, and the result is the same."""
    used = set()
    for stop in range(1, STEPS):
        folder = tmp_path / str(stop)
        handles = await engines()
        counting = Counting(handles)
        counting.hold_after = stop
        async with service(folder, handles) as jobs:
            record, _ = await jobs.submit(PROBLEM)
            await wait_until(lambda: not counting.go.is_set())  # noqa: B023
            async with asyncio.timeout(60):
                while await replies(jobs) < counting.requests:  # noqa: ASYNC110  there is no event to wait for
                    await asyncio.sleep(0.01)
        counting.hold_after = 10**9
        counting.go.set()
        async with service(folder, handles) as jobs:
            record = await wait_for_end(jobs, record.id)
        assert record.result is not None
        assert (record.state, record.result["answer"], len(record.result["steps"])) == (JobState.DONE, "17", STEPS)
        assert counting.requests == STEPS
        used.add(sum(seat["completion_tokens"] for seat in record.result["usage"].values()))
    assert len(used) == 1  # usage before the stop counts too


async def test_job_restarts_if_its_replies_do_not_fit_the_workflow(tmp_path: Path) -> None:
    handles = await engines()
    counting = Counting(handles)
    counting.hold_after = 3
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        await wait_until(lambda: not counting.go.is_set())
    counting.hold_after = 10**9
    counting.go.set()
    team = embedded_team("solo")  # its first call goes to another seat
    async with JobService(tmp_path / "jobs.db", team) as jobs:
        jobs.use(Orchestrator(team, handles, jobs.on_event))
        kinds = [event.kind async for event in jobs.events.follow_job(record.id)]
    assert "anew" in kinds
    assert kinds[-1] in ("done", "failed")


async def test_a_job_whose_deadline_comes_before_an_engine_wakes_is_refused_at_once(tmp_path: Path) -> None:
    team = embedded_team()
    async with JobService(tmp_path / "jobs.db", team) as jobs:
        wakes_in_s = 2.5
        jobs.use(Orchestrator(team, await engines(), jobs.on_event), lambda: wakes_in_s)
        with pytest.raises(Busy, match=r"deadline_s: the first engine wakes in 2\.5 s, .* deadline of 2 s") as refused:
            await jobs.submit(PROBLEM.model_copy(update={"deadline_s": 2}))
        assert refused.value.retry_s == wakes_in_s
        assert await jobs.journal.read(queries.jobs) == []
        for submission in (PROBLEM, PROBLEM.model_copy(update={"deadline_s": 3})):
            record, _ = await jobs.submit(submission)
            assert (await wait_for_end(jobs, record.id)).state is JobState.DONE
        wakes_in_s = 0.0
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"deadline_s": 2}))
        assert (await wait_for_end(jobs, record.id)).state is JobState.DONE


async def test_drain_ends_running_jobs_and_keeps_queued_ones(tmp_path: Path) -> None:
    handles = await engines()
    counting = Counting(handles)
    counting.go.clear()
    async with service(tmp_path, handles, Service(jobs_at_once=2)) as jobs:
        ids = [(await jobs.submit(PROBLEM))[0].id for _ in range(5)]
        draining = asyncio.create_task(jobs.drain(60))
        await wait_until(lambda: jobs.draining)
        counting.go.set()
        assert await draining == 3
        with pytest.raises(Busy, match="the service is stopping"):
            await jobs.submit(PROBLEM)
        states = [record.state for id in ids if (record := await jobs.get(id))]
        assert states == [JobState.DONE] * 2 + [JobState.QUEUED] * 3
    async with service(tmp_path) as jobs:
        assert {(await wait_for_end(jobs, id)).state for id in ids} == {JobState.DONE}


async def test_drain_counts_a_job_in_its_backoff(tmp_path: Path) -> None:
    handles = await engines()
    Counting(handles).failures = 1
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        async for event in jobs.events.follow_job(record.id):
            if event.data.get("why") == "the engine failed":
                break
        assert await jobs.drain(60) == 1
        queued = await jobs.get(record.id)
        assert queued is not None
        assert queued.state is JobState.QUEUED
    async with service(tmp_path) as jobs:
        assert (await wait_for_end(jobs, record.id)).state is JobState.DONE


async def test_job_that_started_too_often_without_ending_fails(tmp_path: Path) -> None:
    async with JobService(tmp_path / "jobs.db", embedded_team()) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        for _ in range(30):
            await jobs.journal.write(lambda t: t.start(record.id))
            await jobs.journal.write(lambda t: t.move(record.id, JobState.QUEUED))
    async with service(tmp_path) as jobs:
        record = await wait_for_end(jobs, record.id)
        assert record.state is JobState.FAILED
        assert record.result is not None
        assert "times without ending" in record.result["error"]


async def test_result_is_written_once_a_full_disk_has_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 0.01)
    handles = await engines()
    counting = Counting(handles)
    counting.go.clear()
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"expected": "a long answer" * 500}))
        await wait_for_start(jobs, record.id)
        await jobs.journal.write(lambda t: t._sql.execute("PRAGMA max_page_count = 1").fetchall())
        counting.go.set()
        await wait_until(lambda: jobs.journal.fault is not None)
        stuck = await jobs.get(record.id)
        assert stuck is not None
        assert stuck.state is JobState.RUNNING
        async with asyncio.timeout(60):
            while jobs.journal.fault is not None:  # this write may share a failed transaction
                with suppress(JournalError):
                    await jobs.journal.write(lambda t: t._sql.execute("PRAGMA max_page_count = 1000000").fetchall())
        assert (await wait_for_end(jobs, record.id)).state is JobState.DONE


def fail_the_first_reply(monkeypatch: pytest.MonkeyPatch, failures: float = math.inf) -> list[str]:
    """Let this many tries to write the first reply of a job fail. Return the list to which each adds the job's id."""
    add_reply, failed = Transaction.add_reply, list[str]()

    def faulty(transaction: Transaction, id: str, reply: ReplyRecord, entries: list[dict[str, Any]]) -> None:
        if reply.number == 1 and len(failed) < failures:
            failed.append(id)
            raise sqlite3.OperationalError("database or disk is full")
        add_reply(transaction, id, reply, entries)

    monkeypatch.setattr(Transaction, "add_reply", faulty)
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 0.01)
    return failed


async def test_replies_during_a_journal_fault_are_written_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_the_first_reply(monkeypatch, failures=5)
    async with service(tmp_path) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        events = [event async for event in jobs.events.follow_job(record.id)]
    assert [event.kind for event in events] == ["queued", "running", *["replied"] * STEPS, "done"]
    assert [event.data["number"] for event in events if event.kind == "replied"] == [*range(1, STEPS + 1)]


async def test_restart_during_a_journal_fault_finds_no_reply_without_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles = await engines()
    counting = Counting(handles)
    counting.hold_after = 4
    with monkeypatch.context() as fault:
        failed = fail_the_first_reply(fault)
        async with service(tmp_path, handles) as jobs:
            record, _ = await jobs.submit(PROBLEM)
            await wait_until(lambda: not counting.go.is_set() and bool(failed))
    counting.hold_after = 10**9
    counting.go.set()
    async with service(tmp_path, handles) as jobs:
        kinds = [event.kind async for event in jobs.events.follow_job(record.id)]
    assert kinds == ["queued", "running", "queued", "running", *["replied"] * STEPS, "done"]


async def test_job_of_a_cancelled_submission_is_worked(tmp_path: Path) -> None:
    submission = PROBLEM.model_copy(update={"idempotency_key": "k"})
    async with service(tmp_path) as jobs:
        caller = asyncio.create_task(jobs.submit(submission))
        await asyncio.sleep(0)  # the write is posted but not committed
        caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()
        record, new = await jobs.submit(submission)
        assert not new
        assert (await wait_for_end(jobs, record.id)).state is JobState.DONE


async def test_cancelled_submission_counts_as_waiting_until_it_is_written(tmp_path: Path) -> None:
    async with JobService(tmp_path / "jobs.db", embedded_team(), Service(queue_max=1)) as jobs:
        caller = asyncio.create_task(jobs.submit(PROBLEM))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        with pytest.raises(Busy, match="the queue is full: 1 jobs wait"):
            await jobs.submit(PROBLEM)


async def test_job_survives_a_stop_that_closes_its_engine_first(tmp_path: Path) -> None:
    """The engines close first. A request that runs alone in one must not be taken for the cause of its end."""
    slow = FakeEngine("planner", lambda request: "word " * 1000, times=ServiceTime(step_s=0.01), time_scale=1)
    planner = SupervisedEngine("planner", lambda grant: slow)
    await planner.start()
    handles: dict[str, Engine] = {**await engines(), "planner": Replicas("planner", [planner])}
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM)
        await wait_until(lambda: slow.stats().running > 0)
        await planner.close()
        await wait_until(lambda: planner.usage.in_flight == 0)
    async with service(tmp_path) as jobs:
        assert (await wait_for_end(jobs, record.id)).state is JobState.DONE


async def test_jobs_start_in_order_after_a_journal_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 0.01)
    start, retry, failures, is_full = Transaction.start, Journal._retry, 0, True

    def faulty(transaction: Transaction, id: str) -> StartedJob | None:
        nonlocal failures
        if is_full:
            failures += 1
            raise sqlite3.OperationalError("database or disk is full")
        return start(transaction, id)

    def retry_after_the_end_of_the_fault(journal: Journal, connection: Connection) -> None:
        """Let the fault end between two tries. If it ends during one, the jobs that are tried later start first."""
        nonlocal is_full
        is_full = not heals
        retry(journal, connection)

    heals = False
    monkeypatch.setattr(Transaction, "start", faulty)
    monkeypatch.setattr(Journal, "_retry", retry_after_the_end_of_the_fault)
    team = embedded_team()
    async with JobService(tmp_path / "jobs.db", team, Service(jobs_at_once=4)) as jobs:
        ids = [(await jobs.submit(PROBLEM))[0].id for _ in range(50)]
        jobs.use(Orchestrator(team, await engines(), jobs.on_event))
        await wait_until(lambda: failures > 20)
        assert sum(jobs.counts.values()) == 50
        assert jobs.journal.fault is not None
        heals = True
        for id in ids:
            assert (await wait_for_end(jobs, id)).state is JobState.DONE
        events = await jobs.journal.read(partial(queries.events, limit=10**6))
    assert [event.job for event in events if event.kind == "running"] == ids


async def test_job_with_an_unreadable_record_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with JobService(tmp_path / "jobs.db", team := embedded_team()) as jobs:
        broken, _ = await jobs.submit(PROBLEM.model_copy(update={"deadline_s": 60}))
        whole, _ = await jobs.submit(PROBLEM)
        start = Transaction.start

        def fail(transaction: Transaction, id: str) -> StartedJob | None:
            if id == broken.id:
                raise KeyError("kind")
            return start(transaction, id)

        monkeypatch.setattr(Transaction, "start", fail)
        jobs.use(Orchestrator(team, await engines(), jobs.on_event))
        assert (await wait_for_end(jobs, whole.id)).state is JobState.DONE
        assert (await wait_for_end(jobs, broken.id)).state is JobState.FAILED
        events = await jobs.journal.read(partial(queries.events, job=broken.id))
        assert events[-1].data["why"] == "an internal error: KeyError('kind')"
        assert not jobs._deadlines


async def test_journal_with_an_unreadable_job_is_refused_and_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with JobService(path, embedded_team()) as jobs:
        await jobs.submit(PROBLEM)
    with closing(sqlite3.connect(path)) as sql, sql:
        sql.execute("UPDATE jobs SET submission = '{}'")
    with pytest.raises(JournalError, match=r"jobs\.db: a job in it cannot be read: .*problem"):
        async with JobService(path, embedded_team()):
            pass
    with closing(sqlite3.connect(path)) as sql, sql:
        sql.execute("DELETE FROM jobs")
    async with JobService(path, embedded_team()) as jobs:  # the file is unlocked
        await jobs.submit(PROBLEM)


async def test_deadline_stops_with_the_work_before_the_result_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 0.01)
    move, failures, full = Transaction.move, 0, True

    def faulty(transaction: Transaction, id: str, state: JobState, *more: Any, **named: Any) -> bool:
        nonlocal failures
        if state is JobState.DONE and full:
            failures += 1
            raise sqlite3.OperationalError("database or disk is full")
        return move(transaction, id, state, *more, **named)

    monkeypatch.setattr(Transaction, "move", faulty)
    async with service(tmp_path) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"deadline_s": 600}))
        await wait_until(lambda: failures > 0)
        assert not jobs._deadlines
        full = False
        assert (await wait_for_end(jobs, record.id)).state is JobState.DONE


async def test_deadline_is_written_after_a_journal_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 0.01)
    move, failures = Transaction.move, 3

    def faulty(transaction: Transaction, id: str, state: JobState, *more: Any, **named: Any) -> bool:
        nonlocal failures
        if state is JobState.EXPIRED and failures:
            failures -= 1
            raise sqlite3.OperationalError("database or disk is full")
        return move(transaction, id, state, *more, **named)

    monkeypatch.setattr(Transaction, "move", faulty)
    async with JobService(tmp_path / "jobs.db", embedded_team()) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"deadline_s": 0.01}))
        assert (await wait_for_end(jobs, record.id)).state is JobState.EXPIRED
    assert failures == 0


async def test_time_budget_excludes_downtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal's clock jumps ahead by an hour between the two runs."""
    handles = await engines()
    counting = Counting(handles)
    counting.hold_after = 3
    async with service(tmp_path, handles) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"time_s": 60}))
        await wait_until(lambda: not counting.go.is_set())
    now = time.time
    monkeypatch.setattr("runtime.jobs.journal.transaction.time.time", lambda: now() + 3600)
    counting.hold_after = 10**9
    counting.go.set()
    async with service(tmp_path, handles) as jobs:
        assert (await wait_for_end(jobs, record.id)).state is JobState.DONE


async def test_time_budget_includes_work_before_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """59.9 of 60 seconds were worked before the restart, so 0.1 s is left."""
    handles = await engines()
    counting = Counting(handles)
    async with JobService(tmp_path / "jobs.db", embedded_team()) as jobs:
        record, _ = await jobs.submit(PROBLEM.model_copy(update={"time_s": 60}))
        await jobs.journal.write(lambda t: t.start(record.id))
        reply = ReplyRecord(1, "planner", Unusable("no plan"), Usage())
        now = time.time
        monkeypatch.setattr("runtime.jobs.journal.transaction.time.time", lambda: now() + 59.9)
        await jobs.journal.write(lambda t: t.add_reply(record.id, reply, []))
    counting.go.clear()
    async with service(tmp_path, handles) as jobs:
        assert (await wait_for_end(jobs, record.id)).state is JobState.EXPIRED


KILLED = """
import asyncio, sys
from pathlib import Path
from runtime.jobs.orchestrator import Orchestrator
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.service import JobService
from runtime.jobs.submission import Submission
from tests.runtime.fakes import embedded_team, engines

async def main():
    team = embedded_team()
    async with JobService(Path(sys.argv[1]), team) as jobs:
        jobs.use(Orchestrator(team, await engines(time_scale=0.5), jobs.on_event))
        for n in range(10**6):
            record, _ = await jobs.submit(Submission(problem="(12+7)*3-(45-5)", expected="17"))
            print(record.id, flush=True)
            await asyncio.sleep(0.002)
asyncio.run(main())
"""


async def test_kills_lose_and_repeat_no_job(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    accepted: list[str] = []
    for count in (60, 20, 80, 40):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(path), stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
        )
        assert process.stdout is not None
        accepted += [(await process.stdout.readline()).decode().strip() for _ in range(count)]
        process.send_signal(signal.SIGKILL)
        accepted += (await process.stdout.read()).decode().split()
        await process.wait()
    async with service(tmp_path) as jobs:
        for id in accepted:
            record = await wait_for_end(jobs, id)
            assert (record.state, record.result and record.result["answer"]) == (JobState.DONE, "17")
        events = await jobs.journal.read(partial(queries.events, limit=10**6))
    ends = [event.job for event in events if event.kind == "done"]
    assert len(accepted) >= 200
    assert len(ends) == len(set(ends))
    assert set(accepted) <= set(ends)
    assert any(event.data.get("why") == "the runtime was started anew" for event in events)
