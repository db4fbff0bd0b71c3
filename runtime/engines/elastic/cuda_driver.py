"""Calls to the CUDA driver, with its statuses as exceptions."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from cuda.bindings import driver

from runtime.engines.elastic.pages import OutOfMemory


class CudaError(RuntimeError):
    """A call to the CUDA driver failed. The message names the call and the driver's status."""


def device_uuid(device: int) -> str:
    """Return the UUID of a device (CUDA's ordinal) or, if the GPU is in MIG mode, of the MIG instance.

    NVML's "GPU-..." and "MIG-..." names contain the same octets. Needs no CUDA context. Raises CudaError if the driver
    does not know the device. Source: cuDeviceGetUuid_v2 in the CUDA Driver API.
    """
    call(driver.cuInit, 0)
    return str(UUID(bytes=bytes(call(driver.cuDeviceGetUuid, device).bytes)))


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the driver and return its result, or None if it has none. Raises OutOfMemory or CudaError."""
    status, *results = function(*arguments)
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory(f"{function.__name__}: the GPU is out of memory")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{function.__name__}: {status.name}")
    return results[0] if results else None
