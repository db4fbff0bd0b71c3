"""The elastic worker on the CPU."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from runtime.engines.elastic.emulated_device import EmulatedDevice
from runtime.engines.elastic.pages import HostPages
from runtime.engines.elastic.settings import Settings
from runtime.engines.elastic.worker import ElasticWorker, host_tensor

LOCK = "device{}"
"""Name of an emulated device's lock in the folder for temporary files, which all engines share."""
WORKING_BYTES = 256 << 20
"""Bytes that an engine process adds to its memory while it works. A bound for small models, not a measurement: at most
190 MiB were seen. Steps compute in this memory, and pages that the process shares with the one that it was forked from
become its own when it writes to them."""


class ElasticCPUWorker(ElasticWorker, CPUWorker):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """vLLM's CPU worker with its KV cache in host pages. It can take turns on an emulated device."""

    _emulated_device: EmulatedDevice | None = None

    def init_device(self) -> None:
        """Prepare this process for computing, as vLLM's CPUWorker does."""
        # The process that uses AMX tiles must request permission from the kernel first. Without it, a bfloat16 model
        # dies with SIGILL at its first token.
        torch.cpu._init_amx()
        if self.vllm_config.model_config.enforce_eager:
            # vLLM compiles some functions even in eager mode, with a C++ compiler at the first request for logprobs.
            # That would stall all requests for seconds, and fail without a compiler.
            torch.compiler.set_stance("force_eager")
        super().init_device()
        # The ranks of an engine share named memory, which killed ranks would leave behind. All have opened it now.
        for path in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*"):
            path.unlink(missing_ok=True)

    def compile_or_warm_up_model(self) -> Any:
        """Warm the model up as the CUDA worker does, then begin to take turns on the emulated device, if there is one.

        Steps of the warm-up are not emulated.
        """
        times = super().compile_or_warm_up_model()
        settings: Settings = self.vllm_config.troupe_settings
        if settings.step_time is not None and self.is_driver_worker:  # the other ranks wait for the first
            self._emulated_device = EmulatedDevice(
                settings.temporary / LOCK.format(settings.device), settings.step_time
            )
        return times

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run a step, on the emulated device if there is one."""
        with self._turn(scheduler_output):
            return super().execute_model(scheduler_output)

    def _turn(self, step: SchedulerOutput) -> AbstractContextManager[None]:
        if self._emulated_device is None or not step.total_num_scheduled_tokens:  # an empty step uses no device
            return nullcontext()
        return self._emulated_device.step(len(step.num_scheduled_tokens))

    def determine_available_memory(self) -> int:
        """Warm the model up and return the ceiling in bytes, as the CUDA worker does.

        CPUWorker's own method would reject a ceiling above the memory that is free at this moment.
        """
        ceiling_bytes = self.cache_config.kv_cache_memory_bytes = self.ceiling_bytes()
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
        return ceiling_bytes

    def reserve(self, size_bytes: int) -> HostPages:
        return HostPages(size_bytes)

    def tensor(self, nbytes: int) -> torch.Tensor:
        return host_tensor(self.pages.address, nbytes)

    def device_bytes(self) -> int:
        return int(psutil.virtual_memory().total)

    def fixed_bytes(self) -> int:
        """Return the memory that only this process holds now, plus WORKING_BYTES."""
        return int(psutil.Process().memory_full_info().uss) + WORKING_BYTES
