"""vLLM's configuration of an engine."""

import threading
from collections.abc import Mapping
from typing import Any

from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from runtime.engines.spec import EngineSpec

_configuring = threading.Lock()


def vllm_config(spec: EngineSpec, further: Mapping[str, Any] | None = None) -> VllmConfig:
    """Return vLLM's configuration for an engine, with `further` engine arguments. Reads the model's configuration."""
    arguments: dict[str, Any] = {
        "model": spec.model,
        "gpu_memory_utilization": 0.01,  # vLLM only checks that this much is free before it loads the weights
        "kv_cache_memory_bytes": 1,  # disables vLLM's profiling; the elastic worker sets its ceiling here
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "dtype": spec.dtype,
        "enforce_eager": spec.enforce_eager,
        "load_format": spec.load_format,
        "reasoning_parser": spec.reasoning_parser or "",
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        "language_model_only": True,  # messages are text, so a vision encoder would only take memory
        "disable_log_stats": True,
        "scheduling_policy": "priority",
        **(further or {}),
        **spec.vllm,
    }
    with _configuring:  # create_engine_config reads and writes environment variables
        return AsyncEngineArgs(**arguments).create_engine_config()
