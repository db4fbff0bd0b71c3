"""A folder for the sockets and files that vLLM leaves behind, gone when its owner is.

A lock on the folder says that its owner lives, also from another container: what a killed owner left is removed by
whoever comes next.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "troupe-engines-"
PATH_MAX_BYTES = 107 - len(f"/{PREFIX}xxxxxxxx/xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")
"""The longest base: vLLM binds a Unix socket named by a UUID in the folder, and such a path has 107 bytes at most."""


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder of ours alone, removed at the end."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > PATH_MAX_BYTES:
        base = "/tmp"
    _sweep(Path(base))
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = os.open(made, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def _sweep(base: Path) -> None:
    for old in base.glob(f"{PREFIX}????????"):
        try:
            if old.stat().st_uid != os.getuid():
                continue
            lock = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or no folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner lives
        else:
            shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(lock)
