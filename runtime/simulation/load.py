"""Modelled engines for a request-level simulation. Workflows, orchestrator, policies, controller and ledger are real.

Modelled are queues, batches whose step time grows with their sequences, chunked prefill, KV blocks, preemption, engines
that slow each other down on one processor, and the one process that all calls pass through. Stalls of a resize and
prefix caching are not modelled.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated

from pydantic import Field, ValidationError

from agents.role import Value
from runtime.config import SHIPPED, complaint, find, read_yaml
from runtime.devices.device import StartedEngines
from runtime.engines.fake import FakeEngine, FakeMemory, Lengths, Processor, Script, ServiceTime
from runtime.engines.fleet import OnState
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.replicas import replica_name
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import SupervisedEngine
from runtime.errors import ConfigError

FOLDER = SHIPPED / "simulation"


class EngineModel(Value):
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
    fixed_bytes: int = Field(default=0, ge=0, description="Memory besides the KV cache, weights included, in bytes.")
    start_s: float = Field(default=0, ge=0, lt=3600, description="Time to start its process, in seconds.")
    sleep_s: float = Field(default=0, ge=0, lt=3600, description="Time to give its memory back, in seconds.")
    asleep_bytes: int = Field(
        default=0, ge=0, description="Memory that it keeps while it sleeps, in bytes, if its process does not end."
    )
    wake_s: float | None = Field(
        default=None,
        ge=0,
        lt=3600,
        description="Time to take its memory back, in seconds. By default its process ends when it sleeps.",
    )

    def decode_step_s(self, sequences: int) -> float:
        """Return the time of a step that decodes one token of each sequence, in seconds."""
        return self.step_s + self.token_s * sequences


class Model(Value):
    """The constants of all engines, which share one processor."""

    lanes: float = Field(gt=0, description="Number of engines that can be in a step at once at full speed.")
    engines: Mapping[str, EngineModel] = Field(min_length=1, description="The engines, by name.")
    kv_cache_bytes: int | None = Field(
        default=None,
        gt=0,
        description="The KV cache of all engines together, in bytes. By default that of the configuration.",
    )
    device_bytes: int | None = Field(
        default=None,
        gt=0,
        description="The memory of the device for engines that sleep, in bytes. By default no engine sleeps.",
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
    path = find(name, FOLDER, "model for --constants")
    try:
        return Model.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {complaint(dict(e), Model)}" for e in error.errors())) from None


@asynccontextmanager
async def engines(
    model: Model,
    scripts: Mapping[str, Script],
    budget_bytes: int,
    time_scale: float = 1,
    lengths: Mapping[str, Lengths] | None = None,
) -> AsyncIterator[tuple[Mapping[str, EngineHandle], Sharing]]:
    """Yield running engines, and the sharing that moves `budget_bytes` of memory between them.

    If the model has `device_bytes`, all engines sleep at first. Otherwise they start with equal shares. `lengths` gives
    the lengths of the calls of some engines, by name. The others count words.
    """
    async with devices(model, scripts, budget_bytes, 1, time_scale, lengths) as started:
        yield started["0"].engines, started["0"].sharing


@asynccontextmanager
async def devices(
    model: Model,
    scripts: Mapping[str, Script],
    budget_bytes: int,
    count: int,
    time_scale: float = 1,
    lengths: Mapping[str, Lengths] | None = None,
    placed: Mapping[str, Collection[str]] | None = None,
) -> AsyncIterator[dict[str, StartedEngines]]:
    """Yield running engines on `count` devices, each with `budget_bytes` of memory and a replica of every engine.

    If `placed` names the engines that start on each device, replicas of the others are absent there. All devices share
    the process that sends the requests. See `engines`.
    """
    front = Processor(1)
    async with AsyncExitStack() as owned:
        started = {}
        for number in range(count):
            device = ModelledDevice(model, scripts, budget_bytes, time_scale, lengths or {}, front)
            names = {engine: engine if count == 1 else replica_name(engine, str(number)) for engine in model.engines}
            on_device = None if placed is None else placed[str(number)]
            started[str(number)] = await device.start(owned, names, on_device)
        yield started


class ModelledDevice:
    """A modelled device, whose engines share a processor and are moved one at a time."""

    def __init__(
        self,
        model: Model,
        scripts: Mapping[str, Script],
        budget_bytes: int,
        time_scale: float,
        lengths: Mapping[str, Lengths],
        front: Processor,
    ) -> None:
        self._model = model
        self._scripts = scripts
        self._budget_bytes = budget_bytes
        self._time_scale = time_scale
        self._lengths = lengths
        self._front = front
        self._processor, self._moving = Processor(model.lanes), asyncio.Lock()
        self._device_bytes = max(budget_bytes, sum(map(_most_bytes, model.engines.values())))

    async def start(
        self,
        owned: AsyncExitStack,
        names: Mapping[str, str],
        placed: Collection[str] | None,
        on_state: OnState = lambda name, state, seconds: None,
    ) -> StartedEngines:
        """Start the engines in `placed`; None starts all. `names` are the names of all replicas on this device.

        `on_state` is called with the states that engines enter from then on.
        """
        running: dict[str, EngineHandle] = {}
        ledger = Ledger(self._budget_bytes)
        for engine, name in names.items():
            made = self._make(engine, name, None)
            absent = placed is not None and engine not in placed
            if self._model.device_bytes or placed is not None:
                report = partial(_report, on_state, name)
                made = supervised = SupervisedEngine(
                    name, partial(self._make, engine, name), report, None, self._moving
                )
            running[name] = await owned.enter_async_context(made)
            if absent:
                await supervised.leave()
            elif self._model.device_bytes:
                await made.sleep()
            ledger.claim(name, made.held_bytes)
        sharing = Sharing(running, ledger)
        owned.push_async_callback(sharing.close)
        return StartedEngines(running, sharing)

    def _make(self, engine: str, name: str, grant: Grant | None) -> EngineHandle:
        constants = self._model.engines[engine]
        fixed_bytes = constants.fixed_bytes + constants.null_blocks * constants.block_bytes
        floor_bytes = constants.floor_blocks * constants.block_bytes
        share = 0.0 if self._model.device_bytes else self._budget_bytes / len(self._model.engines) / self._device_bytes
        share = max(share, (fixed_bytes + floor_bytes) / self._device_bytes)
        times = ServiceTime(
            constants.step_s,
            constants.token_s,
            constants.prefill_s,
            constants.call_s,
            constants.start_s,
            constants.sleep_s,
            constants.wake_s or 0.0,
        )
        return FakeEngine(
            name,
            self._scripts[engine],
            max_num_seqs=constants.max_num_seqs,
            times=times,
            time_scale=self._time_scale,
            memory=FakeMemory(
                device=self._device_bytes,
                fixed=fixed_bytes,
                floor=floor_bytes,
                token=constants.block_bytes // constants.block_tokens,
                block_tokens=constants.block_tokens,
                asleep=constants.asleep_bytes,
            ),
            grant=grant or Grant(share, constants.max_num_seqs, 2048),
            processor=self._processor,
            front=self._front,
            lengths=self._lengths.get(engine),
            naps=constants.wake_s is not None,
        )


def _report(on_state: OnState, name: str, state: EngineState) -> None:
    on_state(name, state, 0.0)


def _most_bytes(engine: EngineModel) -> int:
    """Return the memory that an engine could use: the largest number of its longest sequences, and two blocks."""
    return engine.fixed_bytes + engine.block_bytes * (engine.max_num_seqs * engine.floor_blocks + 2)
