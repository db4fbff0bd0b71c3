"""Address space reserved once and backed by memory as it is needed: the contract, and its backend for the host.

The other backend, for NVIDIA GPUs, is `cuda_pages`.
"""

import ctypes
import mmap
import os
from abc import ABC, abstractmethod

_MAP_NORESERVE = 0x4000
"""Linux's: mmap has the name from Python 3.13 on."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class OutOfMemory(MemoryError):
    """The device has no memory for the pages asked for; those that were backed before still are."""


class Pages(ABC):
    """`size` bytes of address space from `address` on. Ranges are [start, stop) bytes from there, in whole granules."""

    address: int
    size: int
    granule: int

    @abstractmethod
    def back(self, start: int, stop: int) -> None:
        """Put zeroed memory behind a range that has none. Raises OutOfMemory, and then nothing has changed."""

    @abstractmethod
    def release(self, start: int, stop: int) -> None:
        """Give the memory behind a range back to the system, once the device has passed the last fence."""

    def fence(self) -> None:
        """Make later releases wait for the work that the device has been given up to now, zeroing included.

        Call it in the thread that gives the device its work, when no later work will touch what is to be released.
        Does nothing if work is done as soon as it is given, as on the host.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Release everything, the address space too. May be called twice."""

    def check(self, start: int, stop: int) -> None:
        """Raise ValueError for a range that is empty, out of bounds, or not in whole granules."""
        if not 0 <= start < stop <= self.size or start % self.granule or stop % self.granule:
            raise ValueError(f"[{start}, {stop}) is no range of whole granules of {self.granule} within {self.size}")


class HostPages(Pages):
    """An anonymous mapping: the kernel puts a zeroed page behind an address when it is first written.

    So `back` costs nothing, and what is backed is a bound on what is resident. `release` is MADV_DONTNEED.
    """

    def __init__(self, size: int) -> None:
        self.granule = mmap.PAGESIZE
        self.size = -(-size // self.granule) * self.granule
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._mapping = mmap.mmap(-1, self.size, flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def back(self, start: int, stop: int) -> None:
        self.check(start, stop)

    def release(self, start: int, stop: int) -> None:
        self.check(start, stop)
        if _libc.madvise(self.address + start, stop - start, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def close(self) -> None:
        if not self._mapping.closed:
            self._mapping.close()
