"""What a worker needs to hold its KV cache in pages: a mixin over vLLM's workers, for the CPU and for CUDA alike."""

from collections.abc import Callable
from ctypes import c_int8
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_layout import KVCacheLayout

from runtime.engines.elastic.layout import BlockLayout, layout_of
from runtime.engines.elastic.pages import OutOfMemory, Pages


class ElasticWorker:
    """Mixin: the cache's address space is reserved for its ceiling, and backed as far as `back` says.

    It starts with its floor: one sequence of the model's full length, and vLLM's null block.
    """

    vllm_config: Any
    pages: Pages
    layout: BlockLayout
    floor_blocks: int
    backed_blocks = 0
    _warming_up = False

    def ceiling_bytes(self) -> int:
        """The most that the KV cache may take: the share that the engine may ever be granted."""
        told = self.vllm_config.additional_config["troupe"]
        return int(told["ceiling_share"] * (told["device_bytes"] or self.device_bytes()))

    def determine_available_memory(self) -> int:
        """The ceiling; what is free at this moment does not come in, so neighbours that start too change nothing."""
        self.vllm_config.cache_config.kv_cache_memory_bytes = self.ceiling_bytes()
        return int(super().determine_available_memory())  # type: ignore[misc]

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Return the layouts that every attention backend in use supports, with those first that move most cheaply.

        vLLM takes the first, unless VLLM_KV_CACHE_LAYOUT or a KV connector names another of them. If blocks are
        outermost, a range of blocks is one range of bytes; otherwise it is one range for each layer. A layout that
        splits a block's page within a layer is left out, because `layout_of` cannot follow it.
        """
        supported = [KVCacheLayout[name] for name in super().get_supported_kv_cache_layouts()]  # type: ignore[misc]
        movable = [layout for layout in supported if layout.is_block_outermost or layout.is_block_compact]
        movable.sort(key=lambda layout: not layout.is_block_outermost)  # a stable sort: vLLM's preference within each
        return [layout.name for layout in movable]

    def reserve(self, size: int) -> Pages:
        """Address space on this worker's device: bytes."""
        raise NotImplementedError

    def device_bytes(self) -> int:
        """The device's memory in all."""
        raise NotImplementedError

    def device_uuid(self) -> str:
        """Return the UUID of the GPU or MIG instance that this process runs on; empty on the host."""
        return ""

    def fixed_bytes(self) -> int:
        """Return the device bytes that this engine holds, or needs during a step, besides its KV cache."""
        raise NotImplementedError

    def tensor(self, nbytes: int) -> torch.Tensor:
        """The first `nbytes` of the pages as int8 [nbytes]."""
        raise NotImplementedError

    def back(self, blocks: int) -> int:
        """Back as many blocks, more or fewer than now; bytes that moved.

        Raises OutOfMemory, and then what was backed still is. Before fewer are backed, no step may be scheduled that
        could touch the rest, and `pages.fence` must have been called since the last that could was given to the device.
        """
        low, high = sorted((self.backed_blocks, blocks))
        move, undo = self.pages.back, self.pages.release
        if blocks < self.backed_blocks:
            move, undo = undo, move
        done: list[tuple[int, int]] = []
        try:
            for span in self.layout.spans(low, high):
                move(*span)
                done.append(span)
        except BaseException:
            for span in done:
                undo(*span)
            raise
        self.backed_blocks = blocks
        return sum(stop - start for start, stop in done)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self._kv_cache_config = kv_cache_config
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]  # of the worker that this is mixed into
        if not self.backed_blocks:
            raise RuntimeError("vLLM did not allocate its KV cache in the way that elastic engines know")

    def compile_or_warm_up_model(self) -> Any:
        """Run vLLM's warm-up with every block backed that it writes. These blocks are the engine's floor from then on.

        vLLM caps its warm-up by the blocks that the cache has, not by those that are backed. An engine that is started
        again warms up within its grant, which is never below its floor. Raises OutOfMemory if the device cannot hold
        the blocks.
        """
        if self.vllm_config.cache_config.use_replayssm:  # its autotuner gives each sequence a block without a step
            self._back_at_least(1 + int(self.vllm_config.scheduler_config.max_num_seqs))
        self._warming_up = True
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._warming_up = False
        self.floor_blocks = self.backed_blocks
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step. While vLLM warms up, first back the blocks that the step names, as the scheduler would have."""
        if self._warming_up:
            self._back_at_least(1 + _highest_block(scheduler_output))
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def _back_at_least(self, blocks: int) -> None:
        blocks = max(self.backed_blocks, min(blocks, self.layout.blocks))
        try:
            self.back(blocks)
        except OutOfMemory as error:
            needed = self.layout.backed_bytes(blocks)
            raise OutOfMemory(
                f"vLLM's warm-up writes {needed} bytes of the KV cache, and the device has no room for them: "
                "lower max_num_seqs or set enforce_eager"
            ) from error

    def _maybe_get_memory_pool_context(self, tag: str) -> Any:
        # vLLM asks here for the context in which it allocates; the CUDA worker for both of its model runners.
        if tag != "kv_cache":
            return super()._maybe_get_memory_pool_context(tag)  # type: ignore[misc]
        return _InPlaceOfZeros(self._kv_cache_config.kv_cache_tensors[0].size, self._allocate)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        config = self._kv_cache_config
        blocks = int(config.num_blocks)
        self.pages = self.reserve(nbytes)
        self.layout = layout_of(config.kv_cache_tensors, blocks, self.pages.granule)
        sequences = get_max_concurrency_for_kv_cache_config(self.vllm_config, config)
        self.floor_blocks = min(blocks, int(-(-blocks // sequences)) + 1)
        self.back(self.floor_blocks)
        return self.tensor(nbytes)


def _highest_block(step: SchedulerOutput) -> int:
    """Return the highest of the KV blocks that a step gives to its requests; 0, the null block, if it gives none."""
    given = [request.block_ids for request in step.scheduled_new_reqs]
    given += [block_ids for block_ids in step.scheduled_cached_reqs.new_block_ids if block_ids is not None]
    return int(max((block for groups in given for group in groups for block in group), default=0))


class _InPlaceOfZeros(TorchFunctionMode):  # type: ignore[misc]  # torch is not analysed: see pyproject.toml
    """Stands in for the one torch.zeros that backs the whole KV cache (`allocate_kv_cache`)."""

    def __init__(self, nbytes: int, allocate: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._nbytes = nbytes
        self._allocate = allocate

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.zeros and args and args[0] == self._nbytes:
            return self._allocate(self._nbytes)
        return func(*args, **(kwargs or {}))


def host_tensor(address: int, nbytes: int) -> torch.Tensor:
    """Host memory at an address as int8 [nbytes]; the memory stays its owner's."""
    return torch.frombuffer((c_int8 * nbytes).from_address(address), dtype=torch.int8)
