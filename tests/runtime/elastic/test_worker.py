"""The elastic worker's part in vLLM's start, with vLLM's own classes and stand-ins for what needs a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker import worker_base

from runtime.engines.elastic.layout import BlockLayout, layout_of
from runtime.engines.elastic.worker import ElasticWorker

MIB = 1 << 20


class AnyLayout(AttentionBackend):  # type: ignore[misc]  # vLLM is not analysed: see pyproject.toml
    """Stands in for FlashAttention, which declares no layouts."""


class FlashInferOnB200(AnyLayout):
    """Stands in for FlashInfer on compute capability 10.x."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


class HeadsOutermost(AnyLayout):
    """Supports a layout in which a block's heads lie apart, and one in which they lie together."""

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
    """The layout that vLLM's engine core settles on for an elastic worker with these backends."""
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
def test_the_layout_is_one_that_every_backend_supports(
    backends: list[type[AttentionBackend]], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    assert resolved(monkeypatch, *backends) == layout


def test_vllm_checks_the_layout_that_a_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    assert resolved(monkeypatch, AnyLayout) == "LBNHC"
    with pytest.raises(ValueError, match=r"valid layouts: \['BLHNC', 'LBHNC'\]"):
        resolved(monkeypatch, FlashInferOnB200)


def test_a_resize_moves_one_range_in_all_or_one_for_each_layer() -> None:
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
