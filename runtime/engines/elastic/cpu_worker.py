"""The elastic worker on the CPU."""

import psutil
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from runtime.engines.elastic.pages import HostPages
from runtime.engines.elastic.worker import ElasticWorker, host_tensor

WORKING_BYTES = 256 << 20
"""What an engine takes beyond its start once it works: pages shared with the process it was forked from become its own
as they are touched, and a step computes. A bound for small models (190 MiB were seen), not measured."""


class ElasticCPUWorker(ElasticWorker, CPUWorker):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's CPU worker with its KV cache in host pages."""

    def determine_available_memory(self) -> int:
        """As on the GPU; vLLM's own worker would refuse a ceiling beyond the memory that is free at this moment."""
        ceiling = self.cache_config.kv_cache_memory_bytes = self.ceiling_bytes()
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
        return ceiling

    def reserve(self, size: int) -> HostPages:
        return HostPages(size)

    def tensor(self, nbytes: int) -> torch.Tensor:
        return host_tensor(self.pages.address, nbytes)

    def device_bytes(self) -> int:
        return int(psutil.virtual_memory().total)

    def fixed_bytes(self) -> int:
        """The process's own memory at its start, and what it will take."""
        return int(psutil.Process().memory_full_info().uss) + WORKING_BYTES
