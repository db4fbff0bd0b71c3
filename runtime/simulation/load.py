"""Modelled engines for a request-level simulation. Workflows, orchestrator, policies, controller and ledger are real.

Modelled are queues, batches whose step time grows with their sequences, chunked prefill, KV blocks, preemption, engines
that slow each other down on one processor, and the one process that all calls pass through. Stalls of a resize and
prefix caching are not modelled.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from runtime.config import SHIPPED, Section, read_yaml
from runtime.engines.fake import FakeEngine, FakeMemory, Lengths, Processor, Script, ServiceTime
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineHandle
from runtime.engines.ledger import Ledger
from runtime.engines.sharing import Sharing
from runtime.errors import ConfigError

FOLDER = SHIPPED / "simulation"


class EngineModel(Section):
    """The constants of one engine. A step takes `step_s`, `token_s` a sequence and `prefill_s` a prompt token."""

    step_s: float = Field(gt=0, lt=100, description="Fixed time of a step, in seconds.")
    token_s: float = Field(ge=0, lt=100, description="Further time of a step for each sequence in it, in seconds.")
    prefill_s: float = Field(
        default=0, ge=0, lt=100, description="Further time of a step for each prompt token, in seconds."
    )
    call_s: float = Field(
        default=0, ge=0, lt=100, description="Time of a call in the process that all calls pass through, in seconds."
    )
    block_bytes: int = Field(gt=0, description="Size of a KV block, in bytes.")
    block_tokens: int = Field(gt=0, description="Size of a KV block, in tokens.")
    null_blocks: int = Field(default=1, ge=0, description="KV blocks that hold nothing. vLLM has one.")
    floor_blocks: int = Field(
        default=1, gt=0, description="KV blocks that the engine always keeps. vLLM keeps those of its longest sequence."
    )
    max_num_seqs: int = Field(gt=0, description="Maximum number of running sequences.")

    def decode_step_s(self, sequences: int) -> float:
        """Return the time of a step that decodes one token of each sequence, in seconds."""
        return self.step_s + self.token_s * sequences


class Model(Section):
    """The constants of all engines, which share one processor."""

    lanes: float = Field(gt=0, description="Number of engines that can be in a step at once at full speed.")
    engines: Mapping[str, EngineModel] = Field(min_length=1, description="The engines, by name.")
    kv_cache_bytes: int | None = Field(
        default=None,
        gt=0,
        description="The KV cache of all engines together, in bytes. By default that of the configuration.",
    )
    rate_factors: Mapping[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        default_factory=dict,
        description="Factors of the arrival rates by the name of a workload, so that a load of 1 means the same on "
        "every device. Other workloads keep their rates.",
    )
    fitted: str = Field(default="", description="Command and machine that the constants come from.")


def read(name: str) -> Model:
    """Read the constants of a model, given by their path or by the name of shipped ones.

    Raises ConfigError, which names the file and the key.
    """
    path = Path(name) if Path(name).is_file() else FOLDER / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ConfigError(f"--constants: there is no file and no shipped name {name!r}; shipped are {shipped}")
    try:
        return Model.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@asynccontextmanager
async def engines(
    model: Model,
    scripts: Mapping[str, Script],
    kv_cache_bytes: int,
    time_scale: float = 1,
    lengths: Mapping[str, Lengths] | None = None,
) -> AsyncIterator[tuple[Mapping[str, EngineHandle], Sharing]]:
    """Yield running engines that start with equal shares of `kv_cache_bytes`, and the sharing that moves it.

    `lengths` gives the lengths of the calls of some engines, by name. The others count words.
    """
    processor, front = Processor(model.lanes), Processor(1)
    device = max(kv_cache_bytes, sum(map(_most_bytes, model.engines.values())))
    running: dict[str, EngineHandle] = {}
    ledger = Ledger(kv_cache_bytes)
    async with AsyncExitStack() as owned:
        for name, engine in model.engines.items():
            null_bytes = engine.null_blocks * engine.block_bytes
            floor_bytes = engine.floor_blocks * engine.block_bytes
            share = max(kv_cache_bytes / len(model.engines), null_bytes + floor_bytes) / device
            running[name] = await owned.enter_async_context(
                FakeEngine(
                    name,
                    scripts[name],
                    max_num_seqs=engine.max_num_seqs,
                    times=ServiceTime(engine.step_s, engine.token_s, engine.prefill_s, engine.call_s),
                    time_scale=time_scale,
                    memory=FakeMemory(
                        device=device,
                        fixed=null_bytes,
                        floor=floor_bytes,
                        token=engine.block_bytes // engine.block_tokens,
                        block_tokens=engine.block_tokens,
                    ),
                    grant=Grant(share, engine.max_num_seqs, 2048),
                    processor=processor,
                    front=front,
                    lengths=(lengths or {}).get(name),
                )
            )
            ledger.claim(name, running[name].limits.held_bytes(share))
        sharing = Sharing(running, ledger)
        owned.push_async_callback(sharing.close)
        yield running, sharing


def _most_bytes(engine: EngineModel) -> int:
    """Return the KV cache that an engine could use: the largest number of its longest sequences, and two blocks."""
    return engine.block_bytes * (engine.max_num_seqs * engine.floor_blocks + 2)
