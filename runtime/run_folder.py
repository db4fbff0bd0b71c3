"""Run folders: each run gets one for its logs and decisions, and removes the oldest folders of ended runs.

A run holds a lock on its folder until its process ends, however it ends. A process id would not tell: in a container
each run has the same one.
"""

import fcntl
import os
import re
import shutil
import time
from pathlib import Path

from runtime import paths
from runtime.errors import TroupeError

KEPT = 20
"""Maximum number of folders of ended runs."""
_NAME = re.compile(r"\d{8}-\d{6}-\d+")
_locks: dict[Path, int] = {}
"""Descriptors of the folders of this process, open until it ends."""


def create() -> Path:
    """Create a folder for this run and return its path; remove all but the newest `KEPT` folders of ended runs.

    Raises TroupeError if the folder cannot be created.
    """
    try:
        paths.runs().mkdir(parents=True, exist_ok=True)
        folder = _make()
        ended = sorted(old for old in paths.runs().iterdir() if _has_ended(old))
    except OSError as error:
        raise TroupeError(
            f"cannot create a folder for logs in {paths.runs()}: {error.strerror}."
            " Set TROUPE_HOME to a folder that you can write to"
        ) from None
    for old in ended[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _make() -> Path:
    """Return a new folder, locked; or the one that this process has made within the same second."""
    while True:
        folder = paths.runs() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        if folder in _locks:
            return folder
        try:
            folder.mkdir()
            lock = os.open(folder, os.O_RDONLY)
        except FileExistsError:  # made by a process of another container
            time.sleep(0.1)
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process holds it for a moment if it looks for folders to remove
        _locks[folder] = lock
        return folder


def _has_ended(folder: Path) -> bool:
    """Return True if the folder belongs to a run whose process has ended."""
    if not _NAME.fullmatch(folder.name):
        return False
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # another process has just removed it, or it belongs to another user
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
