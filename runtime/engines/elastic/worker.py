"""A mixin for vLLM's workers, on the CPU and on CUDA, that keeps the KV cache in pages."""

from collections.abc import Callable
from ctypes import c_int8
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_layout import KVCacheLayout

from runtime.engines.elastic.block_tables import forget_blocks
from runtime.engines.elastic.layout import BlockLayout, layout_of
from runtime.engines.elastic.pages import OutOfMemory, Pages


@dataclass(frozen=True)
class Figures:
    """A worker's measurements of its device and of itself, for EngineLimits."""

    device_bytes: int
    device_uuids: tuple[str, ...]
    fixed_bytes: int
    asleep_bytes: int
    copy_bytes: int


class ElasticWorker:
    """A mixin that reserves address space for the ceiling of the KV cache, and backs the first `backed_blocks` blocks.

    A worker starts with the blocks of one sequence of the model's full length and vLLM's null block backed. The blocks
    that the warm-up writes then belong to its floor too. Address space, and with it the cache's tensors, never move, so
    CUDA graphs stay valid.

    The methods from `reserve` to `restore_weights` are the device's part, which each worker class provides. The others
    override those of vLLM's worker, or belong to a resize (`back`).
    """

    vllm_config: Any
    model_runner: Any
    use_v2_model_runner: bool
    pages: Pages
    layout: BlockLayout
    floor_blocks: int
    backed_blocks = 0
    gpus = 1
    _warming_up = False

    def ceiling_bytes(self) -> int:
        """Return the most bytes that the KV cache may ever hold: the engine's highest share of the device."""
        settings = self.vllm_config.troupe_settings
        return int(settings.ceiling_share * (settings.device_bytes or self.device_bytes()))

    def determine_available_memory(self) -> int:
        """Return the ceiling in bytes. Ignore free memory, because other engines may be loading at the same time.

        Overrides the method of vLLM's Worker, which uses `kv_cache_memory_bytes` if it is set.
        """
        self.vllm_config.cache_config.kv_cache_memory_bytes = self.ceiling_bytes()
        return int(super().determine_available_memory())  # type: ignore[misc]

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Return the layouts that every attention backend in use supports, those that are cheapest to resize first.

        vLLM takes the first, unless VLLM_KV_CACHE_LAYOUT or a KV connector names another of them. If blocks are
        outermost, a range of blocks is one range of bytes; otherwise it is one range per layer. Layouts that split a
        block's page within a layer are left out, because `layout_of` does not support them.
        """
        supported = [KVCacheLayout[name] for name in super().get_supported_kv_cache_layouts()]  # type: ignore[misc]
        resizable = [layout for layout in supported if layout.is_block_outermost or layout.is_block_compact]
        resizable.sort(key=lambda layout: not layout.is_block_outermost)  # stable: keeps vLLM's order within each group
        return [layout.name for layout in resizable]

    def reserve(self, size_bytes: int) -> Pages:
        """Reserve `size_bytes` of address space on this worker's device."""
        raise NotImplementedError

    def device_bytes(self) -> int:
        """Return the total memory of the device in bytes."""
        raise NotImplementedError

    def device_uuid(self) -> str:
        """Return the UUID of the GPU or MIG instance that this process runs on; empty on the host."""
        return ""

    def figures(self) -> "Figures":
        """Return what this worker has measured."""
        return Figures(
            self.device_bytes(),
            (self.device_uuid(),) if self.device_uuid() else (),
            self.fixed_bytes(),
            self.asleep_bytes(),
            self.copy_bytes(),
        )

    def fixed_bytes(self) -> int:
        """Return the device bytes that this engine holds, or needs during a step, besides its KV cache."""
        raise NotImplementedError

    def tensor(self, nbytes: int) -> torch.Tensor:
        """Return a tensor over the first `nbytes` of the pages: int8 [nbytes]. It shares their memory."""
        raise NotImplementedError

    def copy_bytes(self) -> int:
        """Return the host memory that `release_weights` takes for its copy; 0 if it cannot release weights."""
        return 0

    def asleep_bytes(self) -> int:
        """Return what this engine keeps on the device after `release_weights` and with `blocks_asleep` backed."""
        return 0

    def release_weights(self) -> int:
        """Copy the weights to host memory, release their device memory, and return the bytes released.

        Addresses stay valid, so CUDA graphs do too. No step may run until `restore_weights`. Raises OutOfMemory if the
        host cannot hold the copy; nothing is released then.
        """
        return 0

    def restore_weights(self) -> int:
        """Back the weights again, fill them from the copy, and return the bytes backed.

        Raises OutOfMemory. Some of the weights may then be backed.
        """
        return 0

    @property
    def blocks_asleep(self) -> int:
        """The blocks that stay backed while the engine sleeps: none, or those of the smallest KV cache."""
        return self.floor_blocks if self.vllm_config.troupe_settings.sleep_keeps_kv else 0

    def back(self, blocks: int) -> int:
        """Back exactly the first `blocks` blocks, more or fewer than now, and return the bytes backed or released.

        Raises OutOfMemory, and then backs the same blocks as before.

        Before it backs fewer blocks, the caller must ensure two things: no step that could touch the others will be
        scheduled, and `fence(blocks)` was called after the last such step was given to the device.
        """
        low, high = sorted((self.backed_blocks, blocks))
        change, undo = self.pages.back, self.pages.release
        if blocks < self.backed_blocks:
            change, undo = undo, change
        done: list[tuple[int, int]] = []
        try:
            for span in self.layout.spans(low, high):
                change(*span)
                done.append(span)
        except BaseException:
            for span in done:
                undo(*span)
            raise
        self.backed_blocks = blocks
        return sum(stop - start for start, stop in done)

    def fence(self, blocks: int) -> None:
        """Prepare a release of the blocks from `blocks` up, which no request may use.

        Later steps do not read these blocks, and the release waits for the steps that the device has been given so far.
        See Pages.fence.
        """
        forget_blocks(self.model_runner, blocks, self.use_v2_model_runner)
        self.pages.fence()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Let vLLM's Worker create its KV cache, over our pages. Raises RuntimeError if it allocated memory of its own.

        Worker.initialize_from_config asks `_maybe_get_memory_pool_context` for the context in which it allocates.
        """
        self._kv_cache_config = kv_cache_config
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]  # of the worker that this is mixed into
        if not self.backed_blocks:
            raise RuntimeError(
                "vLLM did not allocate its KV cache with one torch.zeros in the context of "
                "_maybe_get_memory_pool_context, so it cannot be resized: use the vLLM release that Troupe is made for"
            )

    def compile_or_warm_up_model(self) -> Any:
        """Run vLLM's warm-up with every block backed that it writes. These blocks become the engine's floor.

        vLLM limits its warm-up by the blocks of the cache, not by the backed ones. An engine that is restarted warms up
        within its grant, because a grant is never below the floor. Raises OutOfMemory if the device cannot hold the
        blocks.
        """
        if self.vllm_config.cache_config.use_replayssm:  # its autotuner gives each sequence a block outside of a step
            self._back_at_least(1 + int(self.vllm_config.scheduler_config.max_num_seqs))
        self._warming_up = True
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._warming_up = False
        self.floor_blocks = self.backed_blocks
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step. During warm-up, first back the blocks of the step: vLLM chooses them without our scheduler."""
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
                f"vLLM's warm-up writes {needed} bytes of the KV cache, which the device cannot hold: "
                "lower max_num_seqs or set enforce_eager"
            ) from error

    def _maybe_get_memory_pool_context(self, tag: str) -> Any:
        # vLLM's workers, with either model runner, allocate the KV cache in the context that this method returns.
        if tag != "kv_cache":
            return super()._maybe_get_memory_pool_context(tag)  # type: ignore[misc]
        return _InPlaceOfZeros(self._kv_cache_config.kv_cache_tensors[0].size, self._allocate)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        """Reserve `nbytes` for the KV cache, back the floor, and return the cache as int8 [nbytes]."""
        config = self._kv_cache_config
        blocks = int(config.num_blocks)
        self.pages = self.reserve(nbytes)
        self.layout = layout_of(config.kv_cache_tensors, blocks, self.pages.granule_bytes)
        sequences = get_max_concurrency_for_kv_cache_config(self.vllm_config, config)
        self.floor_blocks = min(blocks, int(-(-blocks // sequences)) + 1)
        self.back(self.floor_blocks)
        return self.tensor(nbytes)


def _highest_block(step: SchedulerOutput) -> int:
    """Return the highest KV block id that a step gives to its requests; 0, the null block, if it gives none."""
    by_request = [request.block_ids for request in step.scheduled_new_reqs]
    by_request += [block_ids for block_ids in step.scheduled_cached_reqs.new_block_ids if block_ids is not None]
    return int(max((block for groups in by_request for group in groups for block in group), default=0))


class _InPlaceOfZeros(TorchFunctionMode):  # type: ignore[misc]  # torch is not analysed: see pyproject.toml
    """A context that replaces the one torch.zeros call with which vLLM allocates its KV cache (`allocate_kv_cache`)."""

    def __init__(self, nbytes: int, allocate: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._nbytes = nbytes
        self._allocate = allocate

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.zeros and args and args[0] == self._nbytes:
            return self._allocate(self._nbytes)
        return func(*args, **(kwargs or {}))


def host_tensor(address: int, nbytes: int) -> torch.Tensor:
    """Return a tensor over host memory at an address: int8 [nbytes]. It does not own the memory."""
    return torch.frombuffer((c_int8 * nbytes).from_address(address), dtype=torch.int8)
