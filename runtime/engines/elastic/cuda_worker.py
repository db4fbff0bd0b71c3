"""The elastic worker on an NVIDIA GPU."""

from functools import cached_property
from typing import Any

import torch
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.utils.mem_utils import memory_profiling
from vllm.utils.torch_utils import current_stream
from vllm.v1.worker.gpu_worker import Worker

from runtime.engines.elastic.cuda_driver import device_uuid
from runtime.engines.elastic.cuda_pages import CudaPages
from runtime.engines.elastic.cuda_weights import CudaWeights
from runtime.engines.elastic.worker import ElasticWorker

CONTEXT_BYTES = 768 << 20
"""GPU bytes that a process holds outside PyTorch's allocator, mostly the CUDA context. A bound, not a measurement."""
GROUP_BYTES = 1 << 30
"""GPU bytes of the buffers of NCCL and of vLLM's all-reduce in a process that works with others. A bound as well."""


class ElasticCUDAWorker(ElasticWorker, Worker):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's CUDA worker with its KV cache in CUDA pages. It can release weights that are in vLLM's CuMem pool."""

    _peak_activation_bytes = 0

    @cached_property
    def _weights(self) -> CudaWeights | None:
        """The weights of the model, which must be loaded; None if the CuMem pool does not hold them."""
        if not self.vllm_config.model_config.enable_cumem_allocator:
            return None
        storages = [parameter.untyped_storage() for parameter in self.model_runner.get_model().parameters()]
        parameters = {(storage.data_ptr(), storage.nbytes()) for storage in storages}
        return CudaWeights(CuMemAllocator.get_instance().pointer_to_data, parameters, current_stream().cuda_stream)

    def determine_available_memory(self) -> int:
        """Return the ceiling in bytes, and measure the peak memory of a full step.

        vLLM's Worker runs one dummy step of `max_num_batched_tokens` here. It measures that step only if it has to
        choose the size of the KV cache. This method measures it in the same way: `transient_peak_headroom` of
        `vllm.utils.mem_utils`.
        """
        with memory_profiling(self.init_snapshot) as profile:
            ceiling_bytes = super().determine_available_memory()
        self._peak_activation_bytes = profile.transient_peak_headroom
        return ceiling_bytes

    def reserve(self, size_bytes: int) -> CudaPages:
        # The stream that vLLM computes on. Its first call to current_stream moves this thread's work to a new stream.
        stream = current_stream().cuda_stream
        granule_bytes = self.vllm_config.troupe_settings.granule_bytes
        return CudaPages(size_bytes, torch.cuda.current_device(), granule_bytes, stream)

    def tensor(self, nbytes: int) -> torch.Tensor:
        return torch.as_tensor(_CudaArray(self.pages.address, nbytes), device=self.device)

    def device_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[1])

    def device_uuid(self) -> str:
        return device_uuid(torch.cuda.current_device())

    def fixed_bytes(self) -> int:
        """Return what PyTorch's allocator holds, plus the peak of a full step, plus CONTEXT_BYTES and GROUP_BYTES.

        The allocator holds weights, CUDA graphs and what warm-up left. Memory of other processes does not count.
        """
        outside_bytes = CONTEXT_BYTES + (GROUP_BYTES if self.parallel_config.world_size > 1 else 0)
        return int(torch.cuda.memory_reserved(self.device)) + self._peak_activation_bytes + outside_bytes

    def copy_bytes(self) -> int:
        return self._weights.nbytes if self._weights else 0

    def asleep_bytes(self) -> int:
        return self.fixed_bytes() - self.copy_bytes() + self.layout.backed_bytes(self.blocks_asleep)

    def release_weights(self) -> int:
        return self._weights.release() if self._weights else 0

    def restore_weights(self) -> int:
        return self._weights.restore() if self._weights else 0


class _CudaArray:
    """Device memory at an address, as int8 [nbytes], which PyTorch wraps without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,), "typestr": "|i1", "data": (address, False), "strides": None, "version": 3
        }  # fmt: skip
