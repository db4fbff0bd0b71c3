"""The weights of an engine on an NVIDIA GPU, which leave the GPU while the engine sleeps.

vLLM allocates the weights in its CuMem pool if `enable_cumem_allocator` is set. The allocations of this pool keep their
addresses when their memory is unmapped, so CUDA graphs stay valid. vLLM's own sleep mode copies every weight at every
sleep. Here, the copies of the model's parameters are made once and kept, so that later sleeps only unmap them.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from cuda.bindings import driver
from vllm.device_allocator import AllocationData, cumem

from runtime.engines.elastic.cuda_driver import call
from runtime.engines.elastic.pages import OutOfMemory

TAG = "weights"
"""The tag of what vLLM's worker allocates in the pool while it loads the model."""
SMALL_SEGMENT_BYTES = 2 << 20
SMALL_TENSOR_BYTES = 1 << 20
"""PyTorch puts tensors of up to this size into segments of SMALL_SEGMENT_BYTES, and larger ones into larger segments:
kSmallSize and kSmallBuffer in c10/cuda/CUDACachingAllocator.h."""


class CudaWeights:
    """The allocations of a CuMem pool that hold weights, and their copies in pinned host memory.

    - `allocations`: those of the whole pool, by address.
    - `parameters`: address and bytes of the storages of the model's parameters. These never change. Whatever else was
      allocated while the model loaded may change, so it is copied again at every release.
    - `stream`: the handle of the CUDA stream that vLLM computes on.

    Methods need a current CUDA context. They raise CudaError if the driver fails.
    """

    def __init__(
        self, allocations: dict[int, AllocationData], parameters: Collection[tuple[int, int]], stream: int
    ) -> None:
        self._allocations = allocations
        self._parameters = frozenset(parameters)  # tied parameters share a storage
        self._stream = stream
        self._copies: dict[int, Any] = {}
        self._constant: set[int] = set()

    @property
    def nbytes(self) -> int:
        """The bytes that a release frees on the device, and that the copies take on the host."""
        return sum(size for _, size, _ in self._weights())

    def release(self) -> int:
        """Make the copies that are missing, unmap all weights, and return the bytes released.

        Waits for the work that the stream has been given. Raises OutOfMemory if the host cannot hold the copies;
        nothing is unmapped then.
        """
        for address, size, data in self._weights():
            if not data.is_asleep and address not in self._constant:
                call(driver.cuMemcpyDtoHAsync, self._copy_of(address, size), address, size, self._stream)
        call(driver.cuStreamSynchronize, self._stream)
        released_bytes = 0
        for address, size, data in self._weights():
            if not data.is_asleep:
                if self._holds_parameters_only(address, size):
                    self._constant.add(address)
                cumem.unmap_and_release(data.handle)
                data.is_asleep = True
                released_bytes += size
        torch.cuda.empty_cache()
        return released_bytes

    def restore(self) -> int:
        """Map all weights again, fill them from their copies, and return the bytes backed.

        Raises OutOfMemory if the device is full. A later call then maps the rest.
        """
        backed_bytes = 0
        for address, size, data in self._weights():
            if data.is_asleep:
                try:
                    cumem.create_and_map(data.handle)
                except RuntimeError as error:
                    raise OutOfMemory(f"the GPU cannot hold the weights: {error}") from error
                data.is_asleep = False
                call(driver.cuMemcpyHtoDAsync, address, self._copies[address], size, self._stream)
                backed_bytes += size
        call(driver.cuStreamSynchronize, self._stream)
        return backed_bytes

    def _weights(self) -> Iterator[tuple[int, int, AllocationData]]:
        """Yield the address, the bytes and the data of each allocation that holds weights."""
        for address, data in self._allocations.items():
            if data.tag == TAG:
                yield address, data.handle[1], data

    def _copy_of(self, address: int, size: int) -> Any:
        """Return the pinned host memory for a copy. Exactly `size` bytes: PyTorch would round up to a power of two."""
        if address not in self._copies:
            try:
                self._copies[address] = call(driver.cuMemHostAlloc, size, 0)
            except OutOfMemory:
                raise OutOfMemory(f"the host cannot hold a copy of the weights, {self.nbytes} bytes") from None
        return self._copies[address]

    def _holds_parameters_only(self, start: int, size: int) -> bool:
        """Return True if an allocation has no room for a tensor that is not a parameter."""
        parameter_bytes = sum(nbytes for address, nbytes in self._parameters if start <= address < start + size)
        return size > SMALL_SEGMENT_BYTES and size - parameter_bytes <= SMALL_TENSOR_BYTES
