"""Owns the SQLite file: its schema, its settings, its lock, and how its errors are reported.

Refuses a file that is no journal, is damaged, or was written by a later version.
"""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from runtime.errors import JournalError

Connection = sqlite3.Connection
"""A connection to a journal. The queries take one."""

VERSION = 1
BUSY_TIMEOUT_S = 10
"""The longest wait of a connection while another process writes."""
_SCHEMA = f"""
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    idempotency_key TEXT UNIQUE,
    state TEXT NOT NULL,
    submission TEXT NOT NULL,
    submitted_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    result TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL
);
CREATE INDEX events_by_job ON events (job, id);
CREATE TABLE cursors (name TEXT PRIMARY KEY, event INTEGER NOT NULL);
PRAGMA user_version = {VERSION};
"""


def connect(path: Path) -> Connection:
    """Open a journal; create it if there is no file.

    Raises JournalError if the file is no journal, is damaged, was written by a later version, or cannot be opened.
    """
    with translate_errors(path):
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S)
        try:
            is_new = _check(connection, path)
            if is_new:
                path.chmod(0o600)
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only takes effect before the first table
            connection.execute("PRAGMA journal_mode = WAL")  # readers never wait for the writer
            connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
            if is_new:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except BaseException:
            connection.close()
            raise
        return connection


def _check(connection: Connection, path: Path) -> bool:
    """Return True if the file is new.

    Raise an error if it belongs to another program, is damaged, or was written by a later version.
    """
    # In this order: another process that creates the journal meanwhile commits its tables and the version together.
    has_tables = connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0 and has_tables:
        raise JournalError(f"{path} is the database of another program; set service.journal to another file")
    if version > VERSION:
        raise JournalError(
            f"{path} was written by a later Troupe (journal version {version}; this one reads {VERSION});"
            " upgrade Troupe, or move the file aside"
        )
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict.splitlines()[-1])
    return bool(version == 0)


def lock(path: Path) -> TextIO:
    """Lock a journal for the one service that works its jobs; closing the returned file releases the lock.

    Raises JournalError if another process holds the lock, OSError if the lock file cannot be made.
    """
    file = path.with_name(f"{path.name}.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise JournalError(
            f"{path} is in use by another `troupe serve`; stop that one, or set service.journal to another file"
        ) from None
    return file


def roll_back(connection: Connection) -> None:
    """End a failed transaction, which SQLite itself may have rolled back already."""
    with suppress(sqlite3.Error):
        connection.execute("ROLLBACK")


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Raise errors of SQLite and of the operating system as a JournalError that names the file and a remedy.

    Errors that our own SQL or data cause are raised unchanged, because the file is not at fault.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        remedy = "; free some space" if "full" in text else ""
        raise JournalError(f"{path}: {text}{remedy}") from error
    except (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise
    except sqlite3.DatabaseError as error:
        raise JournalError(
            f"{path} is damaged ({error}). Nothing was changed. Recover its jobs with"
            f" `sqlite3 {path.name} .recover | sqlite3 recovered.db`, and move it aside"
        ) from error
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror or error}") from error
