"""Tests of the elastic worker during vLLM's start, with vLLM's own classes and stubs for what needs a GPU."""

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils import mem_utils
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker import gpu_worker, worker_base
from vllm.v1.worker.gpu.warmup import warmup_kernels

from runtime.engines.elastic.layout import BlockLayout, Run, layout_of
from runtime.engines.elastic.pages import OutOfMemory, Pages
from runtime.engines.elastic.worker import ElasticWorker

MIB = 1 << 20


class AnyLayout(AttentionBackend):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """A stub of FlashAttention, which declares no layouts."""


class FlashInferOnB200(AnyLayout):
    """A stub of FlashInfer on compute capability 10.x."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


class HeadsOutermost(AnyLayout):
    """A backend with a layout that separates the heads of a block, and one that keeps them together."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LHBNC, KVCacheLayout.LBHNC)


class Worker(ElasticWorker, worker_base.WorkerBase):  # type: ignore[misc]  # vLLM is not analysed
    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(
                kv_cache_layout=None, num_gpu_blocks_override=None, prefix_cache_retention_interval=None
            ),
            kv_transfer_config=None,
            attention_config=SimpleNamespace(hisparse_config=None),
        )  # fmt: skip


def resolved(monkeypatch: pytest.MonkeyPatch, *backends: type[AttentionBackend]) -> str:
    """Return the layout that vLLM's engine core chooses for an elastic worker with these backends."""
    monkeypatch.setattr(worker_base, "get_current_attn_backends", lambda config: backends)
    worker = Worker()
    return str(resolve_kv_cache_layout(worker.vllm_config, [worker.get_supported_kv_cache_layouts()]).name)


@pytest.mark.parametrize(
    ("backends", "layout"),
    [
        ([AnyLayout], "BLNHC"),
        ([FlashInferOnB200], "BLHNC"),
        ([AnyLayout, FlashInferOnB200], "BLHNC"),
        ([FlexAttentionBackend], "LBNHC"),
        ([CPUAttentionBackend], "LBHNC"),
        ([HeadsOutermost], "LBHNC"),
    ],
)
def test_layout_is_supported_by_every_backend(
    backends: list[type[AttentionBackend]], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    assert resolved(monkeypatch, *backends) == layout


def test_vllm_checks_the_layout_that_the_user_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    assert resolved(monkeypatch, AnyLayout) == "LBNHC"
    with pytest.raises(ValueError, match=r"valid layouts: \['BLHNC', 'LBHNC'\]"):
        resolved(monkeypatch, FlashInferOnB200)


def test_resize_changes_one_range_or_one_per_layer() -> None:
    def layout(name: str) -> BlockLayout:
        spec = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=128, dtype=torch.bfloat16)
        config: Any = Worker().vllm_config
        config.cache_config.get_resolved_kv_cache_layout = lambda: KVCacheLayout[name]
        group = KVCacheGroupSpec([f"layer.{n}" for n in range(3)], spec)
        cache = get_kv_cache_config_from_groups(config, [group], 600 * MIB)
        return layout_of(cache.kv_cache_tensors, cache.num_blocks, 2 * MIB)

    page = 2 * 16 * 4 * 128 * 2
    for name in ("BLNHC", "BLHNC"):
        assert [run.stride for run in layout(name).runs] == [3 * page]
        assert len(list(layout(name).spans(100, 1000))) == 1
    for name in ("LBNHC", "LBHNC"):
        assert [run.stride for run in layout(name).runs] == [page] * 3
        assert len(list(layout(name).spans(100, 1000))) == 3


class Allocator:
    """A stub of torch.accelerator: PyTorch's allocator, with 100 MiB of weights."""

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = 100 * MIB

    def compute(self, peak_bytes: int, kept_bytes: int) -> None:
        """Run a step that needs `peak_bytes` and keeps `kept_bytes` allocated; the rest stays reserved."""
        self.peak = max(self.peak, self.allocated + peak_bytes)
        self.reserved = max(self.reserved, self.allocated + peak_bytes)
        self.allocated += kept_bytes

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def reset_peak_memory_stats(self, device: object) -> None:
        self.peak = self.allocated

    def memory_stats(self, device: object) -> dict[str, int]:
        return {"allocated_bytes.all.peak": self.peak, "allocated_bytes.all.current": self.allocated}

    def memory_reserved(self, device: object) -> int:
        return self.reserved

    def get_memory_info(self, device: object) -> tuple[int, int]:
        return 800 * MIB - self.reserved, 1000 * MIB


def test_fixed_bytes_include_the_peak_of_a_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.engines.elastic.cuda_worker import CONTEXT_BYTES, ElasticCUDAWorker

    class Profiled(ElasticCUDAWorker):
        """The CUDA worker in its state before vLLM's profile run."""

        def __init__(self) -> None:
            self.vllm_config = SimpleNamespace(
                cache_config=SimpleNamespace(kv_cache_memory_bytes=1),
                troupe_settings=SimpleNamespace(ceiling_share=0.5, device_bytes=None),
            )
            self.cache_config = self.vllm_config.cache_config
            self.model_config = SimpleNamespace(multimodal_config=None)
            self.parallel_config = SimpleNamespace(world_size=1)
            self.device = torch.device("cpu")
            self.init_snapshot = mem_utils.MemorySnapshot(device=self.device)
            self.model_runner = SimpleNamespace(
                profile_run=lambda randomize_inputs: allocator.compute(peak_bytes=300 * MIB, kept_bytes=20 * MIB)
            )

    allocator = Allocator()
    monkeypatch.setattr(torch, "accelerator", allocator)
    monkeypatch.setattr(torch.cuda, "mem_get_info", allocator.get_memory_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", allocator.memory_reserved)
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    worker = Profiled()
    assert worker.determine_available_memory() == 500 * MIB
    allocator.empty_cache()  # vLLM does so before it captures CUDA graphs
    allocator.compute(peak_bytes=30 * MIB, kept_bytes=10 * MIB)
    assert allocator.reserved == 150 * MIB
    assert worker.fixed_bytes() == CONTEXT_BYTES + 150 * MIB + 280 * MIB


class Warmable:
    """A stub of vLLM's CUDA worker with vLLM's own warm-up. A step only records the blocks that it may touch."""

    model_runner: Any
    backed_blocks: int

    def compile_or_warm_up_model(self) -> str:
        self.touched = 0
        warmup_kernels(self.model_runner, self.execute_model, lambda grammar_output: None)
        return "times"

    def execute_model(self, step: SchedulerOutput) -> None:
        by_request = [request.block_ids for request in step.scheduled_new_reqs]
        by_request += [ids for ids in step.scheduled_cached_reqs.new_block_ids if ids is not None]
        self.touched = max([self.touched, *(block for ids in by_request for block in chain(*ids))])
        assert self.touched < self.backed_blocks, f"block {self.touched} is touched, {self.backed_blocks} are backed"


class WarmWorker(ElasticWorker, Warmable):
    def __init__(self, pages: Pages, layout: BlockLayout, floor_blocks: int) -> None:
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(use_replayssm=False))
        self.pages, self.layout, self.floor_blocks = pages, layout, floor_blocks
        self.back(floor_blocks)


def runner(sequences: int, drafts: int, groups: int, blocks: int) -> SimpleNamespace:
    """Return a stub with all attributes of the V2 model runner that vLLM's warm-up reads."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=128, dtype=torch.bfloat16)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(is_mm_encoder_only=False, num_lookahead_tokens=drafts),
        scheduler_config=SimpleNamespace(max_num_seqs=sequences, max_num_batched_tokens=2048),
        kv_cache_config=SimpleNamespace(
            num_blocks=blocks, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups
        ),
        model_config=SimpleNamespace(get_vocab_size=lambda: 64),
        kv_connector=SimpleNamespace(set_disabled=lambda disabled: None),
        model_state=None, adaptive_verification=None, rejection_sampler=None, kv_block_zeroer=None,
        is_encoder_decoder=False, is_pooling_model=False, is_last_pp_rank=True,
        num_speculative_steps=drafts, decode_query_len=1 + drafts, max_model_len=512,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sequences", "drafts", "groups", "highest"), [(64, 0, 1, 64), (64, 5, 1, 128), (64, 0, 3, 192), (8, 0, 1, 8)]
)
def test_blocks_that_warm_up_writes_are_backed_and_become_the_floor(
    sequences: int, drafts: int, groups: int, highest: int, cuda: Callable[..., Pages], monkeypatch: pytest.MonkeyPatch,
    driver: ctypes.CDLL,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    layout = BlockLayout((Run(0, MIB),), 1000, 2 * MIB)
    worker = WarmWorker(cuda(layout.size_bytes), layout, floor_blocks=36)
    worker.model_runner = runner(sequences, drafts, groups, layout.blocks)
    assert worker.compile_or_warm_up_model() == "times"
    assert worker.touched == highest
    floor = max(36, highest + 1)
    assert (worker.floor_blocks, worker.backed_blocks) == (floor, floor)
    assert driver.stub_in_use() == layout.backed_bytes(floor)
    worker.touched = 0  # after warm-up, steps back no blocks
    with pytest.raises(AssertionError, match=f"block {floor} is touched, {floor} are backed"):
        worker.execute_model(step_that_writes(floor))


def step_that_writes(block: int) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.scheduled_cached_reqs.new_block_ids = [([block],), None]
    return step


def test_replayssm_warm_up_has_one_backed_block_per_sequence(
    cuda: Callable[..., Pages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    backed: list[int] = []

    class Autotuned(WarmWorker):
        def _back_at_least(self, blocks: int) -> None:
            super()._back_at_least(blocks)
            backed.append(self.backed_blocks)

    layout = BlockLayout((Run(0, MIB),), 50, 2 * MIB)
    worker = Autotuned(cuda(layout.size_bytes), layout, floor_blocks=4)
    worker.vllm_config.cache_config.use_replayssm = True
    worker.vllm_config.scheduler_config = SimpleNamespace(max_num_seqs=64)
    worker.model_runner = runner(2, 0, 1, layout.blocks)
    worker.compile_or_warm_up_model()
    assert set(backed) == {50}
    assert worker.floor_blocks == 50


def test_out_of_memory_during_warm_up_names_the_remedy(cuda: Callable[..., Pages], driver: ctypes.CDLL) -> None:
    layout = BlockLayout((Run(0, MIB),), 1000, 2 * MIB)
    worker = WarmWorker(cuda(layout.size_bytes), layout, floor_blocks=36)
    worker.model_runner = runner(64, 0, 1, layout.blocks)
    driver.stub_set_limit(40 * MIB)
    with pytest.raises(OutOfMemory, match=r"69206016 bytes .* lower max_num_seqs or set enforce_eager"):
        worker.compile_or_warm_up_model()


def test_failed_grow_waits_for_zeroing_before_it_releases(cuda: Callable[..., Pages], driver: ctypes.CDLL) -> None:
    layout = BlockLayout((Run(0, 2 * MIB), Run(16 * MIB, 2 * MIB)), 8, 2 * MIB)
    worker = WarmWorker(cuda(layout.size_bytes), layout, floor_blocks=2)
    driver.stub_hold(1)
    driver.stub_set_limit(18 * MIB)  # enough for the first run of blocks only
    with pytest.raises(OutOfMemory):
        worker.back(6)
    assert (worker.backed_blocks, driver.stub_in_use(), driver.stub_queued()) == (2, 8 * MIB, 0)


def test_pages_use_the_stream_that_vllm_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.engines.elastic import cuda_worker

    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(cuda_worker, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(cuda_worker, "CudaPages", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    worker = object.__new__(cuda_worker.ElasticCUDAWorker)
    worker.vllm_config = SimpleNamespace(troupe_settings=SimpleNamespace(granule_bytes=4 * MIB))
    worker.reserve(10 * MIB)
    assert made == [(10 * MIB, 0, 4 * MIB, 7)]
