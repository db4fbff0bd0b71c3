"""Address space that is reserved once and backed with memory as needed: the interface, and its host backend.

`cuda_pages` holds the backend for NVIDIA GPUs.
"""

import ctypes
import mmap
import os
from abc import ABC, abstractmethod

_MAP_NORESERVE = 0x4000
"""Linux's value. Python's mmap has the name only from 3.13 on."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class OutOfMemory(MemoryError):
    """The device has too little free memory for the requested pages. Pages that were backed before still are."""


class Pages(ABC):
    """Address space of `size_bytes` from `address` on, backed with memory in granules of `granule_bytes`.

    Ranges are [start, stop) in bytes relative to `address`, in whole granules. `back` and `release` raise ValueError
    for any other range.
    """

    address: int
    size_bytes: int
    granule_bytes: int

    @abstractmethod
    def back(self, start: int, stop: int) -> None:
        """Back a range with zeroed memory. No part of it may be backed yet.

        Raises OutOfMemory, and then leaves the range unbacked.
        """

    @abstractmethod
    def release(self, start: int, stop: int) -> None:
        """Return the memory of a range to the system. Waits until the device has passed the last fence."""

    def fence(self) -> None:
        """Make later releases wait for the work that the device has been given so far, including zeroing.

        Call it in the thread that submits work to the device, once no later work can touch the pages to be released.
        The default does nothing: on the host, work is complete when it is submitted.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Release all memory and the address space. Calling it again has no effect."""

    def check(self, start: int, stop: int) -> None:
        """Raise ValueError for a range that is empty, out of bounds, or not in whole granules."""
        if not 0 <= start < stop <= self.size_bytes or start % self.granule_bytes or stop % self.granule_bytes:
            raise ValueError(
                f"[{start}, {stop}) is not a range of whole granules: expected multiples of {self.granule_bytes} "
                f"within 0 to {self.size_bytes}"
            )


class HostPages(Pages):
    """An anonymous mapping of host memory.

    The kernel puts a zeroed page behind an address at the first write. So `back` costs nothing, and the backed bytes
    are an upper bound of the resident ones. `release` calls madvise with MADV_DONTNEED.
    """

    def __init__(self, size_bytes: int) -> None:
        self.granule_bytes = mmap.PAGESIZE
        self.size_bytes = -(-size_bytes // self.granule_bytes) * self.granule_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._mapping = mmap.mmap(-1, self.size_bytes, flags=flags)
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
