"""Durability: what a write has returned for is on the disk, and a write that fails leaves nothing behind."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from runtime.errors import JournalError
from runtime.jobs.job import JobState
from runtime.jobs.journal import queries
from runtime.jobs.journal.database import connect
from runtime.jobs.journal.journal import Journal
from runtime.jobs.journal.records import JobEvent
from runtime.jobs.journal.transaction import Transaction, Write
from runtime.jobs.submission import Submission

SUBMISSION = Submission(problem="1+1")


async def test_events_are_published_once_in_order_after_the_commit(tmp_path: Path) -> None:
    published: list[JobEvent] = []

    def on_commit(events: Sequence[JobEvent]) -> None:
        with sqlite3.connect(tmp_path / "jobs.db") as other:
            (last,) = other.execute("SELECT max(id) FROM events").fetchone()
        assert last >= events[-1].id  # another connection sees them, so they are committed
        published.extend(events)

    def accept(name: str) -> Write[object]:
        return lambda t: t.accept(name, SUBMISSION)

    async with Journal(tmp_path / "jobs.db", on_commit) as journal:
        await asyncio.gather(*(journal.write(accept(str(n))) for n in range(50)))
        await journal.write(lambda t: t.move("7", JobState.CANCELLED, why="enough"))
        assert published == await journal.read(queries.events)
        assert await journal.read(partial(queries.events, after=49)) == published[49:]
    assert [event.id for event in published] == list(range(1, 52))
    assert (published[-1].job, published[-1].kind, published[-1].data) == ("7", "cancelled", {"why": "enough"})


async def test_failed_write_is_undone_and_the_next_one_succeeds(journal: Journal) -> None:
    def fail(transaction: Transaction) -> None:
        transaction.accept("a", SUBMISSION)
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(JournalError, match=r"jobs\.db: database or disk is full; free some space"):
        await journal.write(fail)
    assert journal.fault is not None
    assert await journal.read(partial(queries.job, id="a")) is None
    await journal.write(lambda t: t.accept("a", SUBMISSION))
    assert journal.fault is None
    assert [event.id for event in await journal.read(queries.events)] == [1]


async def test_failed_write_does_not_affect_others_in_its_transaction(tmp_path: Path) -> None:
    published: list[JobEvent] = []

    def accept(name: str, error: Exception | None) -> Write[str]:
        def write(transaction: Transaction) -> str:
            transaction.accept(name, SUBMISSION)
            if error is not None:
                raise error
            return name

        return write

    async with Journal(tmp_path / "jobs.db", published.extend) as journal:
        errors = [None, ValueError("a defect"), None, sqlite3.IntegrityError("UNIQUE constraint failed"), None]
        writes = [accept(name, error) for name, error in zip("abcde", errors, strict=True)]
        outcomes = await asyncio.gather(*map(journal.post, writes), return_exceptions=True)
        assert [outcomes[0], outcomes[2], outcomes[4]] == ["a", "c", "e"]
        assert isinstance(outcomes[1], ValueError)
        assert isinstance(outcomes[3], sqlite3.IntegrityError)  # a defect of the write, not of the file
        assert [record.id for record in await journal.read(queries.jobs)] == ["e", "c", "a"]
        assert published == await journal.read(queries.events)
    assert [(event.id, event.job) for event in published] == [(1, "a"), (2, "c"), (3, "e")]


async def test_failed_transaction_fails_all_its_writes_and_publishes_nothing(tmp_path: Path) -> None:
    published: list[JobEvent] = []
    async with Journal(tmp_path / "jobs.db", published.extend) as journal:

        def roll_back(transaction: Transaction) -> None:
            """Roll back the whole transaction, as SQLite itself does after some errors."""
            transaction._sql.execute("ROLLBACK")
            raise sqlite3.OperationalError("disk I/O error")

        writes: list[Write[object]] = [lambda t: t.accept("a", SUBMISSION), roll_back]
        outcomes = await asyncio.gather(*map(journal.post, writes), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [JournalError, JournalError]
        assert await journal.read(queries.jobs) == []
        assert published == []
        await journal.write(lambda t: t.accept("a", SUBMISSION))
    assert [event.id for event in published] == [1]


@pytest.mark.parametrize("undone", ["SELECT 1", "ROLLBACK"], ids=["the write", "the transaction"])
async def test_failed_writes_of_a_job_are_retried_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undone: str
) -> None:
    """The file takes no restart of job a for a while. Everything else of job a waits, and job b does not."""
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 0.01)
    published: list[JobEvent] = []
    restart, failures, is_full = Transaction.restart, 0, True

    def faulty(transaction: Transaction, id: str) -> None:
        nonlocal failures
        if id == "a" and is_full:
            failures += 1
            transaction._sql.execute(undone)
            raise sqlite3.OperationalError("database or disk is full")
        restart(transaction, id)

    monkeypatch.setattr(Transaction, "restart", faulty)
    async with Journal(tmp_path / "jobs.db", published.extend) as journal:
        for id in "ab":
            await journal.write(lambda t, id=id: t.accept(id, SUBMISSION))  # type: ignore[misc]
        first = journal.post(lambda t: t.restart("a"), job="a")
        second = journal.post(lambda t: t.move("a", JobState.RUNNING), job="a")
        async with asyncio.timeout(60):
            while failures < 3:  # noqa: ASYNC110  there is no event to wait for
                await asyncio.sleep(0.01)
        last = journal.post(lambda t: t.move("a", JobState.CANCELLED), job="a")
        await journal.write(lambda t: t.restart("b"), job="b")
        assert not any(write.done() for write in (first, second, last))
        assert journal.fault is not None
        assert [event.kind for event in published if event.job == "a"] == ["queued"]
        is_full = False
        assert [await second, await last] == [True, True]
        assert [event.kind for event in published if event.job == "a"] == ["queued", "anew", "running", "cancelled"]
        assert journal.fault is None


async def test_failed_write_does_not_block_the_retries_of_other_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All jobs share the transaction that job a fails, as a reply does that is too large for the disk."""
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 0.01)
    all_posted, is_full = threading.Event(), True

    def start(id: str) -> Write[bool]:
        def write(transaction: Transaction) -> bool:
            if id == "a" and is_full:
                transaction._sql.execute("ROLLBACK")
                raise sqlite3.OperationalError("database or disk is full")
            return transaction.move(id, JobState.RUNNING)

        return write

    async with Journal(tmp_path / "jobs.db") as journal, asyncio.timeout(60):
        for id in "bac":
            await journal.write(lambda t, id=id: t.accept(id, SUBMISSION))  # type: ignore[misc]
        journal.post(lambda t: all_posted.wait())
        b, a, c = (journal.post(start(id), job=id) for id in "bac")
        all_posted.set()
        assert [await b, await c] == [True, True]
        assert not a.done()
        assert journal.fault is not None
        is_full = False
        assert await a
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # one fault, logged once


async def test_leaving_tries_failed_writes_again_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file takes writes again before their next try is due. One of them was never tried."""
    monkeypatch.setattr("runtime.jobs.journal.journal.RETRY_S", 3600.0)
    restart, is_full = Transaction.restart, True

    def faulty(transaction: Transaction, id: str) -> None:
        if is_full:
            raise sqlite3.OperationalError("database or disk is full")
        restart(transaction, id)

    monkeypatch.setattr(Transaction, "restart", faulty)
    async with Journal(tmp_path / "jobs.db") as journal:
        await journal.write(lambda t: t.accept("a", SUBMISSION))
        journal.post(lambda t: t.restart("a"), job="a")
        await journal.write(lambda t: None)
        is_full = False
        journal.post(lambda t: t.move("a", JobState.RUNNING), job="a")
    with closing(connect(tmp_path / "jobs.db")) as sql:
        assert [event.kind for event in queries.events(sql)] == ["queued", "anew", "running"]


async def test_write_of_a_cancelled_caller_is_done(journal: Journal) -> None:
    caller = asyncio.create_task(journal.write(lambda t: t.accept("a", SUBMISSION)))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    await journal.write(lambda t: None)
    assert await journal.read(partial(queries.job, id="a")) is not None


async def test_full_disk_is_reported_and_accepted_jobs_stay(tmp_path: Path) -> None:
    """SQLite's own size limit stands for a full disk: SQLite raises the same error in the same place."""
    path = tmp_path / "jobs.db"
    async with Journal(path) as journal:
        await journal.write(lambda t: t.accept("a", SUBMISSION))
        await journal.write(lambda t: t._sql.execute("PRAGMA max_page_count = 1").fetchall())
        with pytest.raises(JournalError, match="full; free some space"):
            await journal.write(lambda t: t.accept("b", Submission(problem="x" * 90_000)))
        assert [record.id for record in await journal.read(queries.jobs)] == ["a"]


def test_acknowledged_jobs_survive_a_kill(tmp_path: Path) -> None:
    """Kill a process that accepts jobs as fast as it can. The journal has all that the process acknowledged."""
    script = f"""
import asyncio
from pathlib import Path
from runtime.jobs.journal.journal import Journal
from runtime.jobs.submission import Submission
async def main():
    async with Journal(Path({str(tmp_path / "jobs.db")!r})) as journal:
        async def accept(n):
            await journal.write(lambda t: t.accept(str(n), Submission(problem="1")))
            print(n, flush=True)
        for start in range(0, 10**6, 20):
            await asyncio.gather(*(accept(n) for n in range(start, start + 20)))
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(500)]
    process.kill()
    acknowledged += process.stdout.read().split()
    process.wait()
    with sqlite3.connect(tmp_path / "jobs.db") as sql:
        stored = {id for (id,) in sql.execute("SELECT id FROM jobs")}
    sql.close()
    assert len(acknowledged) >= 500
    assert set(acknowledged) - {""} <= stored
