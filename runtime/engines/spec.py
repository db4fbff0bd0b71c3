"""The configuration of one engine."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator


class EngineSpec(BaseModel):
    """What a configuration says of one engine.

    `gpu_memory_utilization` is the share of the device that the engine begins with, weights included; the KV cache
    gets what the share leaves, or `kv_cache_memory_bytes` where that is given. While it runs the engine may be
    granted up to `max_gpu_memory_utilization`; the address space for that is reserved at its start. On a GPU memory
    moves in granules of `kv_granule_bytes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="a folder, relative to the configuration, or a hub's model name")
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    max_gpu_memory_utilization: float = Field(default=1, gt=0, le=1)
    kv_cache_memory_bytes: ByteSize | None = Field(default=None, gt=0)
    kv_granule_bytes: ByteSize = Field(default=ByteSize(32 << 20), gt=0)
    max_model_len: int | None = Field(default=None, gt=0)
    max_num_seqs: int = Field(default=64, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    enforce_eager: bool = False
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    vllm: Mapping[str, Any] = Field(default_factory=dict, description="further arguments of vLLM's engine, as they are")

    @field_validator("vllm")
    @classmethod
    def _not_ours(cls, further: Mapping[str, Any]) -> Mapping[str, Any]:
        """What Troupe sets itself is not to be set behind its back."""
        ours = {*cls.model_fields, "additional_config", "disable_log_stats", "distributed_executor_backend"}
        if taken := sorted(ours & set(further)):
            place = "is a key beside vllm" if taken[0] in cls.model_fields else "is set by Troupe"
            raise ValueError(f"{taken[0]} {place}, not one in it")
        return further
