"""A request-level model of a team at work: the real workflows, orchestrator, policies, controller and ledger over
modelled engines, on a clock that jumps.

What is modelled: queues, batches whose step time grows with the sequences in them, blocks of KV cache, preemption, and
engines that slow each other on one processor, behind one process that all calls go through. What is not: stalls of a
resize, prefix caching.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from runtime.config import Control, Section, read_yaml
from runtime.engines.fake import FakeEngine, FakeMemory, Processor, Script, ServiceTime
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineHandle
from runtime.engines.ledger import Ledger
from runtime.engines.sharing import Sharing
from runtime.errors import ConfigError


class EngineModel(Section):
    """One engine: seconds of a step (`step_s` + `token_s` a sequence + `prefill_s` a prompt token), bytes of a block of
    `block_tokens` tokens, the sequences that it may run at once, and seconds that a call takes besides (`call_s`). In
    `null_blocks` nothing is kept: vLLM has one."""

    step_s: float = Field(gt=0, lt=100)
    token_s: float = Field(ge=0, lt=100)
    prefill_s: float = Field(default=0, ge=0, lt=100)
    call_s: float = Field(default=0, ge=0, lt=100)
    block_bytes: int = Field(gt=0)
    block_tokens: int = Field(gt=0)
    null_blocks: int = Field(default=1, ge=0)
    max_num_seqs: int = Field(gt=0)


class Model(Section):
    """Engines by name on one processor of so many `lanes`: that many can be in a step at once at full speed."""

    lanes: float = Field(gt=0)
    engines: Mapping[str, EngineModel] = Field(min_length=1)
    fitted: str = Field(default="", description="where the constants come from")


def read(path: Path) -> Model:
    """A model's constants. Raises ConfigError naming the key."""
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
) -> AsyncIterator[tuple[Mapping[str, EngineHandle], Sharing]]:
    """Modelled engines that are up and share so much KV cache equally, and what moves it between them."""
    processor, front = Processor(model.lanes), Processor(1)
    device = max(kv_cache_bytes, sum(e.block_bytes * (e.max_num_seqs + 2) for e in model.engines.values()))
    running: dict[str, EngineHandle] = {}
    ledger = Ledger(kv_cache_bytes)
    async with AsyncExitStack() as owned:
        for name, engine in model.engines.items():
            null_bytes = engine.null_blocks * engine.block_bytes
            share = max(kv_cache_bytes / len(model.engines), null_bytes + engine.block_bytes) / device
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
                        floor=engine.block_bytes,
                        token=engine.block_bytes // engine.block_tokens,
                        block_tokens=engine.block_tokens,
                    ),
                    grant=Grant(share, engine.max_num_seqs, 2048),
                    processor=processor,
                    front=front,
                )
            )
            ledger.claim(name, running[name].limits.held_bytes(share))
        sharing = Sharing(running, ledger)
        owned.push_async_callback(sharing.close)
        yield running, sharing


def control() -> Control:
    """How the controller runs in a simulation: as it does by default."""
    return Control()
