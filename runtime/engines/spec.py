"""The configuration of one engine."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, field_validator, model_validator

from agents.role import Value

ReplicaCount = Annotated[int, Field(ge=1, le=10_000)] | Literal["all"]
"""A number of replicas, of which no two share a device; `all` for one on each device."""
COPIES_BLOCKS = "vLLM would copy KV blocks at times when Troupe may release their memory"
"""The reason why an engine may have no KV connector. `kv_offloading_size` makes one."""


class ReplicaRange(Value):
    """The fewest and the most replicas of an engine."""

    min: int = Field(default=1, ge=1, le=10_000, description="The fewest replicas, with which the team starts.")
    max: ReplicaCount = Field(default="all", description="The most replicas; `all` for one on each of `devices`.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max != "all" and self.max < self.min:
            raise ValueError(f"max: {self.max} is below min, {self.min}; give at least that")
        return self


class EngineSpec(Value):
    """The configuration of one engine: its model, the memory that it starts with, and the limits of later grants."""

    model: str = Field(
        min_length=1, description="A model folder, relative to the configuration file, or a model name on a hub."
    )
    gpu_memory_utilization: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="The share of the device that the engine starts with, weights included. The KV cache gets what the "
        "weights and buffers leave of it.",
    )
    max_gpu_memory_utilization: float = Field(
        default=1,
        gt=0,
        le=1,
        description="The largest share of the device that the engine can ever be granted. The engine reserves address "
        "space for it at start.",
    )
    replicas: ReplicaCount | ReplicaRange = Field(
        default=1,
        description="The number of devices with a replica of the engine; `all` for each of `devices`. With "
        "`{min, max}`, replicas are added and removed while the team runs. Requests go to the replica where they wait "
        "least.",
    )
    kv_cache_memory_bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="The size of the KV cache at start, for example 2GiB. It replaces gpu_memory_utilization.",
    )
    kv_granule_bytes: ByteSize = Field(
        default=ByteSize(32 << 20),
        gt=0,
        description="The unit in which a GPU engine's KV cache grows and shrinks, rounded up to the device's own unit.",
    )
    max_model_len: int | None = Field(
        default=None,
        gt=0,
        description="The most tokens that a prompt and its reply may have together. Default: the model's own limit.",
    )
    max_num_seqs: int = Field(
        default=64, gt=0, description="The most requests that the engine can ever be granted to run at once."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="The type of the weights and activations; auto takes the model's own."
    )
    enforce_eager: bool = Field(default=False, description="Run without CUDA graphs and torch.compile.")
    load_format: Literal["auto", "safetensors", "dummy"] = Field(
        default="auto",
        description="The way in which vLLM loads the weights. dummy gives random weights, for measurements.",
    )
    tool_call_parser: str | None = Field(
        default=None,
        description="The name of vLLM's parser for the model's tool calls, for example hermes. Without one, requests "
        "with tools are refused.",
    )
    reasoning_parser: str | None = Field(
        default=None,
        description="The name of vLLM's parser for the model's reasoning, for example qwen3. The default is vLLM's own "
        "for the model, if it has one.",
    )
    sleep: Literal["auto", "never"] = Field(
        default="auto",
        description="`auto` if the residency policy may put the engine to sleep, else `never`. An engine with a "
        "minimum_share above 0 never sleeps.",
    )
    sleep_keeps_kv: bool = Field(
        default=False,
        description="Keep the smallest KV cache on the GPU while the engine sleeps, so that prefixes in it need not be "
        "computed again. On a CPU nothing is kept.",
    )
    vllm: Mapping[str, Any] = Field(
        default_factory=dict, description="Further vLLM engine arguments, passed on unchanged."
    )

    @property
    def gpus(self) -> int:
        """The number of GPUs that one replica needs: vLLM's tensor_parallel_size."""
        return int(self.vllm.get("tensor_parallel_size", 1))

    def replica_bounds(self, devices: int) -> tuple[int, int]:
        """Return the fewest and the most replicas on this many devices."""
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas.min, devices if self.replicas.max == "all" else self.replicas.max
        count = devices if self.replicas == "all" else self.replicas
        return count, count

    @field_validator("vllm")
    @classmethod
    def _refuse_what_troupe_cannot_honour(cls, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        parallel = {"pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size", "nnodes"}
        set_by_troupe = {"disable_log_stats", "distributed_executor_backend"}
        copies_blocks = {"kv_offloading_size", "kv_transfer_config"}
        for name in sorted(arguments):
            if name in parallel and arguments[name] != 1:
                raise ValueError(f"{name}: use tensor_parallel_size for a model that needs several GPUs, or replicas")
            if name == "tensor_parallel_size" and not (type(arguments[name]) is int and arguments[name] > 0):
                raise ValueError(f"{name}: {arguments[name]!r} is not a number of GPUs; give 1 or more")
            if name in cls.model_fields:
                raise ValueError(f"{name} is a key beside vllm: move it out of vllm")
            if name in set_by_troupe:
                raise ValueError(f"{name} is set by Troupe: remove it from vllm")
            if name in copies_blocks and arguments[name] is not None:
                raise ValueError(f"{name}: {COPIES_BLOCKS}; remove it from vllm")
            # TritonAttentionImpl._ensure_scale_caches. Nothing but this key selects such a type.
            if name == "kv_cache_dtype" and str(arguments[name]).endswith("_per_token_head"):
                raise ValueError(
                    f"{name}: {arguments[name]}: vLLM would write to all blocks of such a KV cache at its first step, "
                    "and most of them have no memory then; use auto or fp8"
                )
        return arguments


def oversubscribe(specs: Iterable[EngineSpec]) -> bool:
    """Return True if engines do not fit the device together, by their gpu_memory_utilization."""
    return sum(spec.gpu_memory_utilization for spec in specs) > 1 + 1e-9
