"""Pages of an NVIDIA GPU's memory, through CUDA's virtual memory management.

The CUDA Driver API, section Virtual Memory Management: cuMemAddressReserve once; cuMemCreate, cuMemMap and
cuMemSetAccess to back; cuMemUnmap and cuMemRelease to release. A granule is a physical allocation of its own, so that
any of them can go.

An address that is not backed faults. kvcached maps one shared page there instead. We do not: growing would have to
unmap that page first, and so wait for the steps in flight. On a shared page a stray write would silently corrupt
tokens; a fault crashes the engine, and the supervisor sends its requests again.
"""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from cuda.bindings import driver

from runtime.engines.elastic.pages import OutOfMemory, Pages


class CudaError(RuntimeError):
    """A call of the CUDA driver failed."""


class CudaPages(Pages):
    """Reserves `size` bytes, rounded up to whole granules, for device `device` (CUDA's ordinal).

    `granule` is rounded up to what the device asks for (2 MiB as a rule); a mapping costs about the same whatever its
    size, so that larger ones move memory faster. `stream` is the handle of the CUDA stream that computes. Zeroing is
    put on it, before whatever the stream is given next, and fences are recorded on it. Expects a current CUDA context.
    """

    def __init__(self, size: int, device: int = 0, granule: int = 32 << 20, stream: int = 0) -> None:
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        least = int(_call(driver.cuMemGetAllocationGranularity, self._properties, minimum))
        self.granule = -(-granule // least) * least
        self.size = -(-size // self.granule) * self.granule
        self.address = int(_call(driver.cuMemAddressReserve, self.size, self.granule, 0, 0))
        self._stream = stream
        self._context = _call(driver.cuCtxGetCurrent)
        flags = driver.CUevent_flags
        waits = flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value
        self._fence = _call(driver.cuEventCreate, waits)
        self._handles: dict[int, Any] = {}

    def back(self, start: int, stop: int) -> None:
        self.check(start, stop)
        backed = [at for at in range(start, stop, self.granule) if at in self._handles]
        if backed:
            raise ValueError(f"[{start}, {stop}) has memory at {backed[0]} already")
        try:
            for at in range(start, stop, self.granule):
                self._back_one(at)
            _call(driver.cuMemSetAccess, self.address + start, stop - start, [self._access], 1)
            _call(driver.cuMemsetD8Async, self.address + start, 0, stop - start, self._stream)
            self.fence()
        except BaseException:
            for at in range(start, stop, self.granule):
                if at in self._handles:
                    self._release_one(at)
            raise

    def _back_one(self, at: int) -> None:
        handle = _call(driver.cuMemCreate, self.granule, self._properties, 0)
        try:
            _call(driver.cuMemMap, self.address + at, self.granule, 0, handle, 0)
        except BaseException:
            _call(driver.cuMemRelease, handle)
            raise
        self._handles[at] = handle

    def release(self, start: int, stop: int) -> None:
        self.check(start, stop)
        missing = [at for at in range(start, stop, self.granule) if at not in self._handles]
        if missing:
            raise ValueError(f"[{start}, {stop}) has no memory at {missing[0]}")
        self._wait()
        for at in range(start, stop, self.granule):
            self._release_one(at)

    def fence(self) -> None:
        _call(driver.cuEventRecord, self._fence, self._stream)

    def _wait(self) -> None:
        """Wait for the fence, in any thread. cuMemUnmap does not always wait for the kernels that are queued."""
        _call(driver.cuCtxSetCurrent, self._context)
        _call(driver.cuEventSynchronize, self._fence)

    def _release_one(self, at: int) -> None:
        _call(driver.cuMemUnmap, self.address + at, self.granule)
        _call(driver.cuMemRelease, self._handles.pop(at))

    def close(self) -> None:
        if not self.size:
            return
        self.fence()
        self._wait()
        for at in list(self._handles):
            self._release_one(at)
        _call(driver.cuMemAddressFree, self.address, self.size)
        _call(driver.cuEventDestroy, self._fence)
        self.size = 0


def device_uuid(device: int) -> str:
    """Return the UUID of a device (CUDA's ordinal) or, if it is in MIG mode, of the MIG instance.

    Source: cuDeviceGetUuid_v2 in the CUDA Driver API. The same octets are in NVML's "GPU-..." and "MIG-..." names.
    Needs no CUDA context. Raises CudaError.
    """
    _call(driver.cuInit, 0)
    return str(UUID(bytes=bytes(_call(driver.cuDeviceGetUuid, device).bytes)))


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the driver; its result without the status. Raises OutOfMemory or CudaError."""
    status, *results = function(*arguments)
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory(f"{function.__name__}: the GPU is out of memory")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{function.__name__}: {status.name}")
    return results[0] if results else None
