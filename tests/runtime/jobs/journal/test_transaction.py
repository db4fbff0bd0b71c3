"""Writes: transitions, replies, deletion, and writes of two processes."""

from functools import partial
from pathlib import Path

import pytest

from agents.tasks import Plan, Solution, Step, Verdict
from agents.workflow import Unusable
from runtime.engines.usage import Usage
from runtime.jobs.job import TRANSITIONS, JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.journal import Journal
from runtime.jobs.journal.records import JobEvent, StartedJob
from runtime.jobs.journal.transaction import Transaction, open_transaction
from runtime.jobs.reply_record import ReplyRecord, StoredReply
from runtime.jobs.submission import Submission

SUBMISSION = Submission(problem="1+1")
REPLIES = (
    ReplyRecord(1, "planner", Plan(steps=(Step(name="A", instruction="1+1"),), answer_step="A"), Usage(5, 6, 0.5)),
    ReplyRecord(2, "solver", Unusable("not a number"), Usage(1, 1)),
    ReplyRecord(3, "solver", Solution(result="2", work="|"), Usage(1, 1)),
    ReplyRecord(4, "critic", Verdict(accepted=True, reason="so"), Usage(1, 1, cost=0.5)),
)


def stored(reply: ReplyRecord) -> StoredReply:
    return StoredReply.from_json(reply.as_json())


async def start(journal: Journal) -> StartedJob:
    started = await journal.write(lambda t: t.start("a"))
    assert started is not None
    return started


@pytest.mark.parametrize("before", JobState)
@pytest.mark.parametrize("after", JobState)
async def test_only_allowed_transitions_change_a_job(journal: Journal, before: JobState, after: JobState) -> None:
    await journal.write(lambda t: t.accept("a", SUBMISSION))
    for state in {JobState.QUEUED: (), JobState.DONE: (JobState.RUNNING, before)}.get(before, (before,)):
        assert await journal.write(lambda t, state=state: t.move("a", state))  # type: ignore[misc]
    known = await journal.read(partial(queries.job, id="a"))
    moved = await journal.write(lambda t: t.move("a", after, {"answer": "2"}))
    record = await journal.read(partial(queries.job, id="a"))
    assert record is not None
    assert moved is (after in TRANSITIONS[before])
    assert (record.state, record.result) == (after, {"answer": "2"}) if moved else record == known
    assert (record.ended_at is not None) is record.state.ended


async def test_started_job_gets_its_replies_in_order(journal: Journal) -> None:
    await journal.write(lambda t: t.accept("a", SUBMISSION))
    assert (await start(journal)).replies == []
    for reply in REPLIES:
        journal.post(lambda t, reply=reply: t.add_reply("a", reply, []))  # type: ignore[misc]
    await journal.write(lambda t: t.move("a", JobState.QUEUED))
    assert (await start(journal)).replies == [stored(reply) for reply in REPLIES]
    await journal.write(lambda t: t.restart("a"))
    journal.post(lambda t: t.add_reply("a", REPLIES[0], []))
    await journal.write(lambda t: t.move("a", JobState.QUEUED))
    started = await start(journal)
    assert started.replies == [stored(REPLIES[0])]
    assert started.record.attempts == 3
    assert await journal.write(lambda t: t.start("a")) is None  # it is running


async def test_no_event_follows_the_end_of_a_job(journal: Journal) -> None:
    await journal.write(lambda t: t.accept("a", SUBMISSION))
    await journal.write(lambda t: t.move("a", JobState.CANCELLED))
    await journal.write(lambda t: t.add_reply("a", REPLIES[0], []))
    assert [event.kind for event in await journal.read(queries.events)] == ["queued", "cancelled"]


async def test_ended_jobs_are_deleted_by_age_and_by_number(journal: Journal) -> None:
    for name in "abcd":
        await journal.write(lambda t, name=name: t.accept(name, SUBMISSION))  # type: ignore[misc]
    for name in "abc":
        await journal.write(lambda t, name=name: t.move(name, JobState.CANCELLED))  # type: ignore[misc]
    assert await journal.write(lambda t: t.delete_ended(0, 2)) == 1
    assert [record.id for record in await journal.read(queries.jobs)] == ["d", "c", "b"]
    assert await journal.read(partial(queries.events, job="a")) == []
    assert await journal.write(lambda t: t.delete_ended(4e9, 100)) == 2
    assert [record.id for record in await journal.read(queries.jobs)] == ["d"]  # it is queued


async def test_events_of_another_process_are_published_in_order(tmp_path: Path) -> None:
    published: list[JobEvent] = []
    path = tmp_path / "jobs.db"
    async with Journal(path, published.extend) as journal:
        await journal.write(lambda t: t.accept("a", SUBMISSION))
        with open_transaction(path) as elsewhere:
            assert elsewhere.move("a", JobState.CANCELLED)
        await journal.write(lambda t: t.accept("b", SUBMISSION))
        with open_transaction(path) as elsewhere:
            assert elsewhere.move("b", JobState.CANCELLED)
        await journal.write(Transaction.catch_up)
        await journal.write(Transaction.catch_up)
    assert [(event.id, event.job, event.kind) for event in published] == [
        (1, "a", "queued"),
        (2, "a", "cancelled"),
        (3, "b", "queued"),
        (4, "b", "cancelled"),
    ]
