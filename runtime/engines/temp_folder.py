"""A temporary folder for the sockets and files that vLLM leaves behind.

The owner holds a lock on its folder while it lives, which processes in other containers see too. If an owner is killed,
the next process that makes such a folder removes the old one.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "troupe-engines-"
SOCKET_BYTES = len("/xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")
"""The length of the path of a Unix socket in the new folder: vLLM names it by a UUID."""
PATH_MAX_BYTES = 107 - len(f"/{PREFIX}xxxxxxxx")
"""The longest possible base folder and socket's path together: Linux allows 107 bytes for the path of a socket."""


@contextmanager
def folder(socket_bytes: int = SOCKET_BYTES) -> Iterator[Path]:
    """Make a folder that only this user can read, and remove it at the end.

    It is not in TMPDIR if the path of a socket, of which `socket_bytes` are in the new folder, would be too long there.
    """
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > PATH_MAX_BYTES - socket_bytes:
        base = "/tmp"
    _remove_abandoned(Path(base))
    path, lock = _make(base)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make(base: str) -> tuple[Path, int]:
    """Return a new folder and the file descriptor of its lock.

    Another process may find the folder before it is locked, and remove it. Then make another one.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _remove_abandoned(base: Path) -> None:
    """Remove this user's folders whose owners are gone."""
    for old in base.glob(f"{PREFIX}????????"):
        try:
            if old.stat().st_uid != os.getuid():
                continue
            lock = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # it was removed meanwhile, or is not a folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # the owner lives
        else:
            shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(lock)
