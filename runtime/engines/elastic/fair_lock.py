"""A lock between processes: first come, first served, and released if its holder dies."""

import fcntl
import os
from pathlib import Path
from typing import Self

_COUNTER_BYTES = 8
"""The start of the file, which holds the last ticket. Byte `_COUNTER_BYTES + n` stands for ticket n."""


class FairLock:
    """A lock between the processes that open the same file, as a context manager. Its file grows to 8 bytes.

    A process takes the next ticket, locks the ticket's byte, and waits until no earlier ticket's byte is locked. These
    are the kernel's record locks (fcntl). The kernel releases them when a process ends, even by SIGKILL, so a dead
    holder or waiter delays nobody. A record lock belongs to the process: threads need a lock of their own, and a
    process must open the file only once.
    """

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        self._ticket = 0

    def __enter__(self) -> Self:
        self._ticket = self._take_ticket()
        try:
            self._wait_for_earlier_tickets()
        except BaseException:  # a signal handler can raise while this waits
            self._return_ticket()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._return_ticket()

    def close(self) -> None:
        """Close the file. This releases the lock if this process holds it."""
        os.close(self._file)

    def _take_ticket(self) -> int:
        fcntl.lockf(self._file, fcntl.LOCK_EX, _COUNTER_BYTES)
        try:
            ticket = int.from_bytes(os.pread(self._file, _COUNTER_BYTES, 0), "little") + 1
            os.pwrite(self._file, ticket.to_bytes(_COUNTER_BYTES, "little"), 0)
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _COUNTER_BYTES + ticket)
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, _COUNTER_BYTES)
        return ticket

    def _wait_for_earlier_tickets(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_SH, self._ticket, _COUNTER_BYTES)
        fcntl.lockf(self._file, fcntl.LOCK_UN, self._ticket, _COUNTER_BYTES)

    def _return_ticket(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _COUNTER_BYTES + self._ticket)
