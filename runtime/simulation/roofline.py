"""The constants of modelled engines on a GPU, derived from published figures. Nothing is measured.

They follow the roofline model (Williams et al., CACM 2009). A decode step reads all weights and the KV cache of every
sequence in it, and computes at the same time. The slower of the two sets its time. A prompt token costs arithmetic.

Simplifications:

- A step that decodes and computes prompts takes the sum of both times, because EngineModel is linear. On a GPU they
  overlap in part.
- The arithmetic of attention is left out. It is a few percent at these lengths.
- Each sequence costs as much as one of mean length.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from runtime.bench.workload import Lengths
from runtime.config import SHIPPED
from runtime.simulation.lengths import mean
from runtime.simulation.load import EngineModel, Model

DTYPE_BYTES = 2
"""Bytes of a weight and of a value in the KV cache: bfloat16."""
BLOCK_TOKENS = 16
"""Tokens of a KV block. This is vLLM's default on CUDA."""
MODEL_TOKENS = 4096
"""`max_model_len` of every engine, as in configs/gpu-24gb.yaml. An engine always keeps memory for one such sequence."""
MEMORY_SHARE = 0.9
"""Part of the GPU's memory that all engines together may use. This is vLLM's default `gpu_memory_utilization`."""
ENGINE_BYTES = 2 * 10**9
"""Assumption: memory of an engine besides weights and KV cache, for the CUDA context, activations and CUDA graphs."""
BANDWIDTH_EFFICIENCY = 0.8
"""Assumption: part of the bandwidth that a decode step achieves."""
COMPUTE_EFFICIENCY = 0.5
"""Assumption: part of the peak FLOP/s that matrix products achieve."""
LINK_EFFICIENCY = 0.8
"""Assumption: part of PCIe's rate that copies of weights achieve. Others reached 53 of 64 GB/s (ServerlessLLM)."""
MAPPING_S = 0.05
"""Assumption: time to map the memory of an engine that wakes, or to unmap that of one that goes to sleep."""
ASLEEP_BYTES = 10**9
"""Assumption: what an engine keeps while it sleeps, CUDA context and CUDA graphs. vLLM keeps 0.8 to 2.9 GiB."""
LAUNCH_S = 0.001
"""Assumption: time of a step in which the GPU waits for the scheduler and for launches, in seconds."""
UTILIZATION = 0.85
"""Part of the device's time that the work needs at a load of 1, in the busiest phase and with memory for everyone."""


@dataclass(frozen=True)
class GPU:
    """The published figures of a GPU: memory in bytes, its bytes/s, dense bfloat16 FLOP/s, PCIe's bytes/s one way."""

    memory_bytes: int
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder with grouped-query attention and a gated MLP, such as Qwen2.5, Qwen3 and Phi-4."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the shape from the `config.json` of a model."""
        shape = json.loads(path.read_text(encoding="utf-8"))
        hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
        return cls(
            layers=shape["num_hidden_layers"],
            hidden=hidden,
            intermediate=shape["intermediate_size"],
            heads=heads,
            kv_heads=shape["num_key_value_heads"],
            head_size=shape.get("head_dim", hidden // heads),
            vocabulary=shape["vocab_size"],
            tied=shape["tie_word_embeddings"],
        )

    @property
    def layer_parameters(self) -> int:
        """Return the parameters of all layers without biases and norms, which are below 0.1%."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def decode_parameters(self) -> int:
        """Return the parameters that a decode step reads: the layers and the output embedding."""
        return self.layer_parameters + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Return all parameters. Input and output embedding are the same if they are tied."""
        return self.decode_parameters + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def token_bytes(self) -> int:
        """Return the bytes that a token takes in the KV cache: a key and a value in every layer and KV head."""
        return 2 * self.layers * self.kv_heads * self.head_size * DTYPE_BYTES


@dataclass(frozen=True)
class Regime:
    """A GPU and the engines that share it: the name of each one's shape in configs/shapes, and its `max_num_seqs`."""

    gpu: GPU
    shapes: Mapping[str, str]
    max_num_seqs: int


SMALL = {"planner": "qwen2.5-0.5b", "solver": "qwen3-4b", "critic": "qwen2.5-1.5b"}
"""The models of configs/gpu-24gb.yaml."""
MEDIUM = {"planner": "qwen2.5-7b", "solver": "qwen2.5-14b", "critic": "qwen2.5-7b"}
"""The largest of these models that fit 80 GB. With a critic of 14B, the weights and buffers alone exceed it."""
LARGE = {"planner": "qwen2.5-7b", "solver": "qwen2.5-32b", "critic": "phi-4"}
"""The models of configs/gpu-h200.yaml."""

REGIMES: Mapping[str, Regime] = {
    "l4": Regime(GPU(24 * 10**9, 300e9, 121e12, 32e9), SMALL, 32),
    "a100": Regime(GPU(80 * 10**9, 2039e9, 312e12, 32e9), MEDIUM, 128),
    "h100": Regime(GPU(80 * 10**9, 3350e9, 989e12, 64e9), MEDIUM, 128),
    "h200": Regime(GPU(141 * 10**9, 4800e9, 989e12, 64e9), LARGE, 128),
}
"""The figures are those of NVIDIA's data sheets "L4", "A100 80 GB" (SXM), "H100" (SXM) and "H200" (SXM).

The data sheets give FLOP/s with sparsity for L4, H100 and H200; half of that is dense. They give PCIe's rate for both
ways together, 64 or 128 GB/s; half of that is one way.
"""


class SharingMode(StrEnum):
    """The way in which engines share the GPU: in turns (CUDA's default), or with overlapping kernels (MPS)."""

    TIME_SLICING = "time-slicing"
    MPS = "mps"


def derive(
    regime: Regime,
    workload: str,
    lengths: Mapping[str, Lengths],
    calls_per_s: Mapping[str, Mapping[str, float]],
    mode: SharingMode,
    sleeping: bool = False,
) -> Model:
    """Return the constants of a regime's engines for a workload.

    `lengths` are those of each engine's calls; an engine that the regime does not name is like its critic.
    `calls_per_s` are the calls of each phase to each engine at the workload's own rates. If the engines are `sleeping`,
    they need not fit the GPU together, and wake by copying their weights over PCIe.
    """
    shapes = {
        name: Shape.read(SHIPPED / "shapes" / f"{regime.shapes.get(name, regime.shapes['critic'])}.json")
        for name in lengths
    }
    engines = {
        name: engine_model(shape, regime.gpu, context_tokens(lengths[name]), regime.max_num_seqs)
        for name, shape in shapes.items()
    }
    if sleeping:
        engines = {name: _sleeping(engine, shapes[name], regime.gpu) for name, engine in engines.items()}
    phases = [_work(engines, lengths, calls) for calls in calls_per_s.values()]
    busiest = max(phases, key=lambda work: work.serial_s)
    return Model(
        lanes=1 if mode is SharingMode.TIME_SLICING else busiest.lanes,
        engines=engines,
        kv_cache_bytes=None if sleeping else kv_cache_bytes(regime.gpu, list(shapes.values())),
        device_bytes=int(regime.gpu.memory_bytes * MEMORY_SHARE) if sleeping else None,
        rate_factors={workload: UTILIZATION / busiest.serial_s},
    )


def engine_model(shape: Shape, gpu: GPU, tokens: float, max_num_seqs: int) -> EngineModel:
    """Return the constants of an engine whose sequences have a mean context of `tokens`.

    A step of n sequences takes `LAUNCH_S + max(n * compute_s, weights_s + n * cache_s)`. The model is the straight line
    through the times of 1 and of `max_num_seqs` sequences. It is exact if memory is the slower of the two at both.
    """
    bytes_per_s = gpu.bytes_per_s * BANDWIDTH_EFFICIENCY
    flops_per_s = gpu.flops_per_s * COMPUTE_EFFICIENCY
    weights_s = shape.decode_parameters * DTYPE_BYTES / bytes_per_s
    cache_s = tokens * shape.token_bytes / bytes_per_s
    compute_s = 2 * shape.decode_parameters / flops_per_s
    first_s, last_s = (max(n * compute_s, weights_s + n * cache_s) for n in (1, max_num_seqs))
    token_s = (last_s - first_s) / (max_num_seqs - 1)
    return EngineModel(
        step_s=LAUNCH_S + first_s - token_s,
        token_s=token_s,
        prefill_s=2 * shape.layer_parameters / flops_per_s,
        block_bytes=BLOCK_TOKENS * shape.token_bytes,
        block_tokens=BLOCK_TOKENS,
        floor_blocks=MODEL_TOKENS // BLOCK_TOKENS,
        max_num_seqs=max_num_seqs,
    )


def _sleeping(engine: EngineModel, shape: Shape, gpu: GPU) -> EngineModel:
    """Return an engine whose weights leave the GPU while it sleeps. A copy of them stays in host memory."""
    weights_bytes = shape.parameters * DTYPE_BYTES
    return engine.model_copy(
        update={
            "fixed_bytes": weights_bytes + ENGINE_BYTES,
            "asleep_bytes": ASLEEP_BYTES,
            "sleep_s": MAPPING_S,
            "wake_s": MAPPING_S + weights_bytes / (gpu.link_bytes_per_s * LINK_EFFICIENCY),
        }
    )


def context_tokens(lengths: Lengths) -> float:
    """Return the mean context of a sequence that decodes: its prompt and half of its reply, in tokens."""
    return mean(lengths.prompt) + mean(lengths.reply) / 2


def kv_cache_bytes(gpu: GPU, shapes: list[Shape]) -> int:
    """Return the KV cache of all engines together: what weights and buffers leave of the GPU's memory."""
    return int(gpu.memory_bytes * MEMORY_SHARE) - sum(s.parameters * DTYPE_BYTES + ENGINE_BYTES for s in shapes)


@dataclass(frozen=True)
class _Work:
    """The time that one second's calls take on the device: launches, reading memory, and arithmetic, in seconds."""

    launch_s: float
    memory_s: float
    compute_s: float

    @property
    def serial_s(self) -> float:
        """Return the time if nothing overlaps. At 1, the device can just keep up."""
        return self.launch_s + self.memory_s + self.compute_s

    @property
    def lanes(self) -> float:
        """Return an upper bound of the engines that MPS can run at once at full speed.

        Assumption: kernels of different engines overlap perfectly, so only the resource that is used most bounds them.
        While one engine decodes, another one can compute prompts. While one engine launches, another one can do either.
        Two engines that decode gain nothing in reality, but the model has one number for all steps.
        """
        return self.serial_s / max(self.memory_s, self.compute_s)


def _work(
    engines: Mapping[str, EngineModel], lengths: Mapping[str, Lengths], calls_per_s: Mapping[str, float]
) -> _Work:
    """Return the work of one second's calls, with memory for everyone: every step has `max_num_seqs` sequences.

    Decoding counts as reading memory. In all regimes, memory is the slower of the two.
    """
    launch_s = memory_s = compute_s = 0.0
    for name, engine in engines.items():
        calls = calls_per_s.get(name, 0)
        steps = calls * mean(lengths[name].reply) / engine.max_num_seqs
        launch_s += steps * LAUNCH_S
        memory_s += steps * (engine.decode_step_s(engine.max_num_seqs) - LAUNCH_S)
        compute_s += calls * mean(lengths[name].prompt) * engine.prefill_s
    return _Work(launch_s, memory_s, compute_s)
