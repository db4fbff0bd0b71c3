"""Pages in the memory of an NVIDIA GPU, with the virtual memory calls of the CUDA Driver API.

cuMemAddressReserve reserves the address space once. cuMemCreate, cuMemMap and cuMemSetAccess back it; cuMemUnmap and
cuMemRelease release it. Each granule is a physical allocation of its own, so each can be released alone. Source: CUDA
Driver API, section Virtual Memory Management.

An access to an unbacked address faults. kvcached maps one shared page there instead. Troupe does not, for two reasons:
to grow, it would have to unmap that page first, and so wait for the steps in flight; and a stray write to a shared page
would silently corrupt tokens. A fault crashes the engine, and the supervisor sends its requests again.
"""

from typing import Any

from cuda.bindings import driver

from runtime.engines.elastic.cuda_driver import call
from runtime.engines.elastic.pages import Pages


class CudaPages(Pages):
    """A range of GPU address space on device `device` (CUDA's ordinal), backed with physical granules.

    `size_bytes` is rounded up to whole granules, and `granule_bytes` to a multiple of the device's minimum (usually
    2 MiB). A mapping costs about the same at any size, so larger granules move memory faster. `stream` is the handle of
    the CUDA stream that vLLM computes on: zeroing runs on it, ahead of later work, and fences are recorded on it.

    The calling thread needs a current CUDA context, except for `release`, which enters the context of the constructor.
    Methods raise CudaError if the driver fails.
    """

    def __init__(self, size_bytes: int, device: int = 0, granule_bytes: int = 32 << 20, stream: int = 0) -> None:
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        minimum_bytes = int(call(driver.cuMemGetAllocationGranularity, self._properties, minimum))
        self.granule_bytes = -(-granule_bytes // minimum_bytes) * minimum_bytes
        self.size_bytes = -(-size_bytes // self.granule_bytes) * self.granule_bytes
        # cuMemMap needs this alignment only, and the driver takes only powers of two, which a granule need not be.
        self.address = int(call(driver.cuMemAddressReserve, self.size_bytes, minimum_bytes, 0, 0))
        self._stream = stream
        self._context = call(driver.cuCtxGetCurrent)
        flags = driver.CUevent_flags
        event_flags = flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value
        self._fence = call(driver.cuEventCreate, event_flags)
        self._handles: dict[int, Any] = {}

    def back(self, start: int, stop: int) -> None:
        self.check(start, stop)
        backed = [at for at in range(start, stop, self.granule_bytes) if at in self._handles]
        if backed:
            raise ValueError(f"cannot back [{start}, {stop}): the granule at {backed[0]} is backed already")
        try:
            for at in range(start, stop, self.granule_bytes):
                self._back_one(at)
            call(driver.cuMemSetAccess, self.address + start, stop - start, [self._access], 1)
            call(driver.cuMemsetD8Async, self.address + start, 0, stop - start, self._stream)
            self.fence()
        except BaseException:
            for at in range(start, stop, self.granule_bytes):
                if at in self._handles:
                    self._release_one(at)
            raise

    def _back_one(self, at: int) -> None:
        handle = call(driver.cuMemCreate, self.granule_bytes, self._properties, 0)
        try:
            call(driver.cuMemMap, self.address + at, self.granule_bytes, 0, handle, 0)
        except BaseException:
            call(driver.cuMemRelease, handle)
            raise
        self._handles[at] = handle

    def release(self, start: int, stop: int) -> None:
        self.check(start, stop)
        missing = [at for at in range(start, stop, self.granule_bytes) if at not in self._handles]
        if missing:
            raise ValueError(f"cannot release [{start}, {stop}): the granule at {missing[0]} is not backed")
        self._wait_for_fence()
        for at in range(start, stop, self.granule_bytes):
            self._release_one(at)

    def fence(self) -> None:
        call(driver.cuEventRecord, self._fence, self._stream)

    def _wait_for_fence(self) -> None:
        """Wait for the last fence, in any thread. cuMemUnmap alone may not wait for queued kernels."""
        call(driver.cuCtxSetCurrent, self._context)
        call(driver.cuEventSynchronize, self._fence)

    def _release_one(self, at: int) -> None:
        call(driver.cuMemUnmap, self.address + at, self.granule_bytes)
        call(driver.cuMemRelease, self._handles.pop(at))

    def close(self) -> None:
        if not self.size_bytes:
            return
        self.fence()
        self._wait_for_fence()
        for at in list(self._handles):
            self._release_one(at)
        call(driver.cuMemAddressFree, self.address, self.size_bytes)
        call(driver.cuEventDestroy, self._fence)
        self.size_bytes = 0
