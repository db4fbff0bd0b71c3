"""Jobs are found by id, key, state and page."""

from functools import partial

from runtime.jobs.job import JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.journal import Journal
from runtime.jobs.submission import Submission


async def test_job_is_found_by_id_key_and_state(journal: Journal) -> None:
    submission = Submission(problem="1+1", idempotency_key="k", priority=3, expected="2")
    record, new = await journal.write(lambda t: t.accept("a", submission))
    assert (new, record.state, record.submission, record.attempts) == (True, JobState.QUEUED, submission, 0)
    assert await journal.read(partial(queries.job, id="a")) == record
    assert await journal.read(partial(queries.job_of_key, key="k")) == record
    assert await journal.read(partial(queries.jobs, state=JobState.QUEUED)) == [record]
    assert await journal.read(partial(queries.jobs, state=JobState.DONE)) == []
    assert await journal.read(partial(queries.job, id="b")) is None
    again, new = await journal.write(lambda t: t.accept("b", submission))
    assert (again, new) == (record, False)
    assert (await journal.read(queries.counts))[JobState.QUEUED] == 1


async def test_jobs_are_listed_in_pages_newest_first(journal: Journal) -> None:
    for name in "abcde":
        await journal.write(lambda t, name=name: t.accept(name, Submission(problem="1+1")))  # type: ignore[misc]
    first = await journal.read(partial(queries.jobs, limit=2))
    assert [record.id for record in first] == ["e", "d"]
    rest = await journal.read(partial(queries.jobs, before=first[-1].number))
    assert [record.id for record in rest] == ["c", "b", "a"]


async def test_half_of_a_surrogate_pair_in_an_old_journal_is_replaced(journal: Journal) -> None:
    stored = {"answer": "half \ud83d, whole \N{GRINNING FACE}, escaped \\\\ud83d", "\ude00": "\ud83d"}
    await journal.write(lambda t: t.accept("a", Submission(problem="1+1")))
    await journal.write(lambda t: t.move("a", JobState.RUNNING))
    await journal.write(lambda t: t.move("a", JobState.DONE, stored))
    record = await journal.read(partial(queries.job, id="a"))
    assert record is not None
    answer = "half \ufffd, whole \N{GRINNING FACE}, escaped \\\\ud83d"
    assert record.result == {"answer": answer, "\ufffd": "\ufffd"}
    events = await journal.read(queries.events)
    assert events[-1].data == {"answer": answer}
