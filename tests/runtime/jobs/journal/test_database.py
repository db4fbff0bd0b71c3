"""A file that is locked, damaged or out of reach is refused, and left as it is."""

import sqlite3
from pathlib import Path

import pytest

from runtime.errors import JournalError
from runtime.jobs.journal.database import connect
from runtime.jobs.journal.journal import Journal
from runtime.jobs.submission import Submission


async def test_second_service_is_refused(tmp_path: Path, journal: Journal) -> None:
    with pytest.raises(JournalError, match="in use by another `troupe serve`"):
        async with Journal(tmp_path / "jobs.db"):
            pass


@pytest.mark.parametrize("damage", ["not a database", "a torn page", "a later version"])
async def test_damaged_journal_is_refused_and_not_changed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "jobs.db"
    async with Journal(path) as journal:
        for n in range(300):
            journal.post(lambda t, n=n: t.accept(str(n), Submission(problem="1" * 200)))  # type: ignore[misc]
    with sqlite3.connect(path) as sql:
        sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if damage == "a later version":
            sql.execute("PRAGMA user_version = 99")
    sql.close()
    if damage == "not a database":
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


async def test_database_of_another_program_is_refused_and_not_changed(tmp_path: Path) -> None:
    path, lock = tmp_path / "accounts.db", tmp_path / "accounts.db.lock"
    with sqlite3.connect(path) as sql:
        sql.execute("CREATE TABLE accounts (name)")
    sql.close()
    path.chmod(0o664)
    lock.write_text("locked by 123")
    before, mode = path.read_bytes(), path.stat().st_mode
    with pytest.raises(JournalError, match=r"accounts\.db is the database of another program; set service\.journal"):
        connect(path)
    with pytest.raises(JournalError, match="another program"):
        async with Journal(path):
            pass
    assert (path.read_bytes(), path.stat().st_mode) == (before, mode)
    assert lock.read_text() == "locked by 123"


async def test_unusable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file"):
        async with Journal(tmp_path / "file" / "jobs.db"):
            pass
