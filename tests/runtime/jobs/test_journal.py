"""The journal over a real SQLite file: what is written is there, whatever happens after."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from agents.role import Plan, Solution, Step, Verdict
from agents.workflow import Unusable
from runtime.engines.usage import Usage
from runtime.errors import JournalError
from runtime.jobs import journal as store
from runtime.jobs.job import TRANSITIONS, JobState
from runtime.jobs.journal import Begun, JobEvent, Journal, Transaction
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.submission import Submission

ASKED = Submission(problem="1+1", idempotency_key="k", priority=3, expected="2")
REPLIES = (
    ReplyRecord(1, "planner", Plan(steps=(Step(name="A", instruction="1+1"),), answer_step="A"), Usage(5, 6, 0.5)),
    ReplyRecord(2, "solver", Unusable("not a number"), Usage(1, 1)),
    ReplyRecord(3, "solver", Solution(result="2", work="|"), Usage(1, 1)),
    ReplyRecord(4, "critic", Verdict(accepted=True, reason="so"), Usage(1, 1, cost=0.5)),
)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with Journal(tmp_path / "jobs.db") as journal:
        yield journal


async def begin(journal: Journal) -> Begun:
    begun = await journal.write(lambda t: t.begin("a"))
    assert begun is not None
    return begun


async def test_what_is_accepted_is_found_by_id_key_and_state(journal: Journal) -> None:
    record, new = await journal.write(lambda t: t.accept("a", ASKED))
    assert (new, record.state, record.submission, record.attempts) == (True, JobState.QUEUED, ASKED, 0)
    assert await journal.read(partial(store.job, id="a")) == record
    assert await journal.read(partial(store.job_of_key, key="k")) == record
    assert await journal.read(partial(store.jobs, state=JobState.QUEUED)) == [record]
    assert await journal.read(partial(store.jobs, state=JobState.DONE)) == []
    assert await journal.read(partial(store.job, id="b")) is None
    again, new = await journal.write(lambda t: t.accept("b", ASKED))
    assert (again, new) == (record, False)
    assert (await journal.read(store.counts))[JobState.QUEUED] == 1


async def test_jobs_are_listed_by_pages_newest_first(journal: Journal) -> None:
    for name in "abcde":
        await journal.write(lambda t, name=name: t.accept(name, Submission(problem="1+1")))  # type: ignore[misc]
    first = await journal.read(partial(store.jobs, limit=2))
    assert [record.id for record in first] == ["e", "d"]
    rest = await journal.read(partial(store.jobs, before=first[-1].number))
    assert [record.id for record in rest] == ["c", "b", "a"]


@pytest.mark.parametrize("before", JobState)
@pytest.mark.parametrize("after", JobState)
async def test_only_allowed_transitions_change_anything(journal: Journal, before: JobState, after: JobState) -> None:
    await journal.write(lambda t: t.accept("a", ASKED))
    for state in {JobState.QUEUED: (), JobState.DONE: (JobState.RUNNING, before)}.get(before, (before,)):
        assert await journal.write(lambda t, state=state: t.move("a", state))  # type: ignore[misc]
    known = await journal.read(partial(store.job, id="a"))
    moved = await journal.write(lambda t: t.move("a", after, {"answer": "2"}))
    record = await journal.read(partial(store.job, id="a"))
    assert record is not None
    assert moved is (after in TRANSITIONS[before])
    assert (record.state, record.result) == (after, {"answer": "2"}) if moved else record == known
    assert (record.ended_at is not None) is record.state.ended


async def test_replies_come_back_as_they_were_and_in_order(journal: Journal) -> None:
    await journal.write(lambda t: t.accept("a", ASKED))
    assert (await begin(journal)).past == []
    for reply in REPLIES:
        journal.post(lambda t, reply=reply: t.replied("a", reply, []))  # type: ignore[misc]
    await journal.write(lambda t: t.move("a", JobState.QUEUED))
    assert (await begin(journal)).past == list(REPLIES)
    await journal.write(lambda t: t.anew("a"))
    journal.post(lambda t: t.replied("a", REPLIES[0], []))
    await journal.write(lambda t: t.move("a", JobState.QUEUED))
    begun = await begin(journal)
    assert begun.past == [REPLIES[0]]
    assert begun.record.attempts == 3
    assert await journal.write(lambda t: t.begin("a")) is None  # it is running


def event(at: float, kind: str, why: str | None = None) -> JobEvent:
    return JobEvent(0, "a", at, kind, {} if why is None else {"why": why})


def test_work_before_a_stop_counts_until_the_last_reply_and_downtime_does_not() -> None:
    assert store.worked_s([event(1, "queued")]) == 0
    waited = [event(1, "queued"), event(5, "running")]
    tried_again = [*waited, event(6, "replied"), event(9, "queued", "the engine is not well"), event(20, "running")]
    assert store.worked_s(tried_again) == 4
    taken_up = [*tried_again, event(23, "replied"), event(1000, "queued", store.TAKEN_UP), event(1001, "running")]
    assert store.worked_s(taken_up) == 4 + 3


async def test_events_are_told_once_committed_in_order_and_with_their_ids(tmp_path: Path) -> None:
    told: list[JobEvent] = []

    def committed(events: Sequence[JobEvent]) -> None:
        with sqlite3.connect(tmp_path / "jobs.db") as other:
            (last,) = other.execute("SELECT max(id) FROM events").fetchone()
        assert last >= events[-1].id  # on the disk before anybody hears
        told.extend(events)

    def accept(name: str) -> store.Do[object]:
        return lambda t: t.accept(name, Submission(problem="1"))

    async with Journal(tmp_path / "jobs.db", committed) as journal:
        await asyncio.gather(*(journal.write(accept(str(n))) for n in range(50)))
        await journal.write(lambda t: t.move("7", JobState.CANCELLED, why="enough"))
        assert told == await journal.read(store.events)
        assert await journal.read(partial(store.events, after=49)) == told[49:]
    assert [event.id for event in told] == list(range(1, 52))
    assert (told[-1].job, told[-1].kind, told[-1].data) == ("7", "cancelled", {"why": "enough"})


async def test_what_another_process_writes_is_told_in_its_place(tmp_path: Path) -> None:
    told: list[JobEvent] = []
    path = tmp_path / "jobs.db"
    async with Journal(path, told.extend) as journal:
        await journal.write(lambda t: t.accept("a", ASKED))
        with store.transaction(path) as elsewhere:
            assert elsewhere.move("a", JobState.CANCELLED)
        await journal.write(lambda t: t.accept("b", Submission(problem="1")))
        with store.transaction(path) as elsewhere:
            assert elsewhere.move("b", JobState.CANCELLED)
        await journal.write(Transaction.catch_up)
        await journal.write(Transaction.catch_up)
    assert [(event.id, event.job, event.kind) for event in told] == [
        (1, "a", "queued"),
        (2, "a", "cancelled"),
        (3, "b", "queued"),
        (4, "b", "cancelled"),
    ]


async def test_a_failed_write_takes_its_whole_transaction_back_and_the_next_succeeds(journal: Journal) -> None:
    def fail(transaction: Transaction) -> None:
        transaction.accept("a", ASKED)
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(JournalError, match=r"jobs\.db: database or disk is full; free some space"):
        await journal.write(fail)
    assert journal.fault is not None
    assert await journal.read(partial(store.job, id="a")) is None
    await journal.write(lambda t: t.accept("a", ASKED))
    assert journal.fault is None
    assert [event.id for event in await journal.read(store.events)] == [1]


async def test_a_failed_write_leaves_the_others_of_its_transaction(tmp_path: Path) -> None:
    told: list[JobEvent] = []

    def write(name: str, error: Exception | None) -> store.Do[str]:
        def do(transaction: Transaction) -> str:
            transaction.accept(name, Submission(problem="1+1"))
            if error is not None:
                raise error
            return name

        return do

    async with Journal(tmp_path / "jobs.db", told.extend) as journal:
        errors = [None, ValueError("a defect"), None, sqlite3.IntegrityError("UNIQUE constraint failed"), None]
        writes = [write(name, error) for name, error in zip("abcde", errors, strict=True)]
        answers = await asyncio.gather(*map(journal.post, writes), return_exceptions=True)
        assert [answers[0], answers[2], answers[4]] == ["a", "c", "e"]
        assert isinstance(answers[1], ValueError)
        assert isinstance(answers[3], sqlite3.IntegrityError)  # a defect of whoever asked, not of the file
        assert [record.id for record in await journal.read(store.jobs)] == ["e", "c", "a"]
        assert told == await journal.read(store.events)
    assert [(event.id, event.job) for event in told] == [(1, "a"), (2, "c"), (3, "e")]


async def test_a_failed_commit_fails_every_write_of_it_and_tells_nobody(tmp_path: Path) -> None:
    told: list[JobEvent] = []
    async with Journal(tmp_path / "jobs.db", told.extend) as journal:

        def end_the_transaction(transaction: Transaction) -> None:
            """As SQLite itself does after some errors."""
            transaction._sql.execute("ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")

        writes: list[store.Do[object]] = [lambda t: t.accept("a", ASKED), end_the_transaction]
        answers = await asyncio.gather(*map(journal.post, writes), return_exceptions=True)
        assert [type(answer) for answer in answers] == [JournalError, JournalError]
        assert await journal.read(store.jobs) == []
        assert told == []
        await journal.write(lambda t: t.accept("a", ASKED))
    assert [event.id for event in told] == [1]


async def test_a_write_whose_caller_is_cancelled_is_done(journal: Journal) -> None:
    caller = asyncio.create_task(journal.write(lambda t: t.accept("a", ASKED)))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    await journal.write(lambda t: None)
    assert await journal.read(partial(store.job, id="a")) is not None


async def test_a_full_file_is_told_and_what_was_accepted_stays(tmp_path: Path) -> None:
    """SQLite's own limit stands for the disk's: the same error from the same place."""
    path = tmp_path / "jobs.db"
    async with Journal(path) as journal:
        await journal.write(lambda t: t.accept("a", ASKED))
        await journal.write(lambda t: t._sql.execute("PRAGMA max_page_count = 1").fetchall())
        with pytest.raises(JournalError, match="full; free some space"):
            await journal.write(lambda t: t.accept("b", Submission(problem="x" * 90_000)))
        assert [record.id for record in await journal.read(store.jobs)] == ["a"]


async def test_those_that_ended_are_forgotten_by_age_and_by_number(journal: Journal) -> None:
    for name in "abcd":
        await journal.write(lambda t, name=name: t.accept(name, Submission(problem="1")))  # type: ignore[misc]
    for name in "abc":
        await journal.write(lambda t, name=name: t.move(name, JobState.CANCELLED))  # type: ignore[misc]
    assert await journal.write(lambda t: t.forget(0, 2)) == 1
    assert [record.id for record in await journal.read(store.jobs)] == ["d", "c", "b"]
    assert await journal.read(partial(store.events, job="a")) == []
    assert await journal.write(lambda t: t.forget(4e9, 100)) == 2
    assert [record.id for record in await journal.read(store.jobs)] == ["d"]  # it waits: never forgotten


async def test_a_second_service_is_refused(tmp_path: Path, journal: Journal) -> None:
    with pytest.raises(JournalError, match="in use by another `troupe serve`"):
        async with Journal(tmp_path / "jobs.db"):
            pass


@pytest.mark.parametrize("damage", ["no database", "a torn page", "a later version"])
async def test_a_damaged_journal_is_refused_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "jobs.db"
    async with Journal(path) as journal:
        for n in range(300):
            journal.post(lambda t, n=n: t.accept(str(n), Submission(problem="1" * 200)))  # type: ignore[misc]
    with sqlite3.connect(path) as sql:
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if damage == "a later version":
            sql.execute("PRAGMA user_version = 99")
    sql.close()
    if damage == "no database":
        path.write_text("a shopping list" * 1000)
    elif damage == "a torn page":
        with path.open("r+b") as file:
            file.seek(4096 * 3)
            file.write(b"\xff" * 4096 * 4)
    before = path.read_bytes()
    with pytest.raises(
        JournalError, match="later Troupe" if damage == "a later version" else r"damaged (?s:.*)\.recover"
    ):
        async with Journal(path):
            pass
    assert path.read_bytes() == before


async def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file"):
        async with Journal(tmp_path / "file" / "jobs.db"):
            pass


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    """A process that accepts as fast as it can is killed; all that it said it had is there."""
    script = f"""
import asyncio
from pathlib import Path
from runtime.jobs.journal import Journal
from runtime.jobs.submission import Submission
async def main():
    async with Journal(Path({str(tmp_path / "jobs.db")!r})) as journal:
        async def one(n):
            await journal.write(lambda t: t.accept(str(n), Submission(problem="1")))
            print(n, flush=True)
        for start in range(0, 10**6, 20):
            await asyncio.gather(*(one(n) for n in range(start, start + 20)))
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(500)]
    process.kill()
    said += process.stdout.read().split()
    process.wait()
    with sqlite3.connect(tmp_path / "jobs.db") as sql:
        there = {id for (id,) in sql.execute("SELECT id FROM jobs")}
    sql.close()
    assert len(said) >= 500
    assert set(said) - {""} <= there
