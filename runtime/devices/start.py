"""Starts the engines of a configuration, each replica on its device."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from runtime.config import Config
from runtime.devices.device import StartedEngines
from runtime.devices.placement import Placement, place, spares
from runtime.devices.selection import select, sizes
from runtime.engines.fleet import Fleet, Measured, OnState
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.launcher import Launcher
from runtime.engines.ledger import Ledger
from runtime.engines.replicas import engine_of
from runtime.engines.sharing import Sharing
from runtime.engines.spec import EngineSpec, oversubscribe
from runtime.engines.step_time import StepTime
from runtime.engines.supervised import SupervisedEngine
from runtime.errors import EngineError
from runtime.telemetry.sampler import Sampler, best_source


class StartedFleet(Protocol):
    """The engines of one device after their start: see Fleet."""

    @property
    def engines(self) -> Mapping[str, EngineHandle]: ...
    @property
    def sharing(self) -> Sharing: ...
    @property
    def supervised(self) -> Mapping[str, SupervisedEngine]: ...
    def add_absent(self, name: str, spec: EngineSpec, replica: Measured) -> None: ...


@dataclass(frozen=True)
class Start:
    """The settings that all engines of a process share.

    - `memory_bytes`, `kv_cache_bytes`: what counts as a whole device, and the limit of its KV caches; see Fleet.
    - `host_bytes`: the host memory for copies of the weights of sleeping engines; None takes half of the machine's.
    - `may_sleep`, `step_times`: by the name of the engine; see Fleet.
    """

    folder: Path
    on_state: OnState
    memory_bytes: int | None = None
    kv_cache_bytes: int | None = None
    host_bytes: int | None = None
    may_sleep: Collection[str] = ()
    step_times: Mapping[str, StepTime] = field(default_factory=dict)


async def start_fleets(
    owned: AsyncExitStack,
    config: Config,
    specs: Mapping[str, EngineSpec],
    may_sleep: Collection[str],
    folder: Path,
    on_state: OnState,
    step_times: Mapping[str, StepTime],
) -> dict[str, Fleet]:
    """Start the engines of all devices at the same time. Return the fleet of each device that has, or can get, any."""
    processes = [spec for spec in specs.values() for _ in range(_replicas_at_most(spec, config))]
    launcher = owned.enter_context(Launcher(processes, folder))
    several = config.devices != (0,)  # otherwise there is nothing to find out before the engines report that they start
    gpus = (await launcher.prepare()).visible_gpus() if several else ()
    devices = select(config, gpus, specs)
    placed = place(specs, [*devices], may_sleep, gpus=sizes(devices))
    absent = spares(specs, placed, sizes(devices))
    start = Start(
        folder,
        on_state,
        config.device.memory_bytes,
        config.device.kv_cache_memory_bytes,
        config.residency.host_memory_bytes,
        may_sleep,
        step_times,
    )
    used = {name: numbers for name, numbers in devices.items() if placed[name] or absent[name]}
    fleets = await start_placed(owned, launcher, start, used, placed, absent)
    add_absent(fleets, absent, measured(fleets), may_sleep)
    return fleets


async def start_placed(
    owned: AsyncExitStack,
    launcher: Launcher,
    start: Start,
    devices: Mapping[str, tuple[int, ...]],
    placed: Placement,
    absent: Placement,
) -> dict[str, Fleet]:
    """Start the engines that are placed on these devices of this process. `absent` are those that can be added later.

    The numbers of the devices are those of `select`.
    """
    total_bytes = psutil.virtual_memory().total
    host = Ledger(total_bytes // 2 if start.host_bytes is None else start.host_bytes)
    fleets = {
        device: Fleet(
            placed[device],
            start.folder,
            start.on_state,
            start.memory_bytes,
            kv_cache_bytes=start.kv_cache_bytes,
            step_times={
                name: start.step_times[engine_of(name)]
                for name in (*placed[device], *absent[device])
                if engine_of(name) in start.step_times
            },
            one_at_a_time=oversubscribe(placed[device].values()),
            may_sleep=[name for name in (*placed[device], *absent[device]) if engine_of(name) in start.may_sleep],
            host=host,
            launcher=launcher,
            device=numbers,
        )
        for device, numbers in devices.items()
    }
    await _enter_all(owned, [*fleets.values()])
    return fleets


async def sampled(owned: AsyncExitStack, fleets: Mapping[str, StartedFleet]) -> dict[str, StartedEngines]:
    """Return the engines of each device with the telemetry of this machine, which `owned` stops."""
    on_gpu = any(engine.limits.device_uuids for fleet in fleets.values() for engine in fleet.engines.values())
    sampler = await owned.enter_async_context(Sampler(best_source(on_gpu)))
    return {
        name: StartedEngines(fleet.engines, fleet.sharing, lambda: sampler.latest) for name, fleet in fleets.items()
    }


def measured(fleets: Mapping[str, StartedFleet]) -> dict[str, Measured]:
    """Return what each engine has measured about itself, by the name of the engine."""
    return {
        engine_of(name): Measured(engine.limits, engine.start_s)
        for fleet in fleets.values()
        for name, engine in fleet.supervised.items()
    }


def add_absent(
    fleets: Mapping[str, StartedFleet], absent: Placement, known: Mapping[str, Measured], may_sleep: Collection[str]
) -> None:
    """Add the replicas that have no process yet, like others of their engines, of which `known` has the measurements.

    Raises EngineError if an engine could never wake.
    """
    for device, fleet in fleets.items():
        for name, spec in absent[device].items():
            fleet.add_absent(name, spec, known[engine_of(name)])
        _check_that_each_can_wake(fleet, [name for name in fleet.engines if engine_of(name) in may_sleep])


def _replicas_at_most(spec: EngineSpec, config: Config) -> int:
    # Without a GPU, `all` is one device. With GPUs, engines need few threads of the processor.
    return spec.replica_bounds(1 if config.devices == "all" else len(config.devices))[1]


async def _enter_all(owned: AsyncExitStack, fleets: Sequence[Fleet]) -> None:
    """Enter fleets at the same time. If one does not start, leave the others and raise its error."""
    entering = [asyncio.create_task(fleet.__aenter__()) for fleet in fleets]
    try:
        await asyncio.wait(entering, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in entering:
            task.cancel()
        await asyncio.wait(entering)
        for fleet, task in zip(fleets, entering, strict=True):
            if not task.cancelled() and task.exception() is None:
                owned.push_async_exit(fleet)
    for task in entering:  # those that were cancelled because another one failed say nothing
        if not task.cancelled():
            task.result()


def _check_that_each_can_wake(fleet: StartedFleet, may_sleep: Collection[str]) -> None:
    """Raise EngineError if the largest engine that may sleep cannot wake beside those that may not."""
    started = {name: each for name, each in fleet.engines.items() if each.state is not EngineState.ABSENT}
    needed = {name: each.limits.smallest_bytes for name, each in started.items()}
    may_sleep = [name for name in may_sleep if name in started]
    asleep = {name: started[name].asleep_bytes for name in may_sleep}
    least_bytes = sum((needed | asleep).values())
    budget_bytes = fleet.sharing.ledger.budget_bytes
    for name in may_sleep:
        if least_bytes + needed[name] - asleep[name] > budget_bytes:
            raise EngineError(
                f"engine {name} can never wake: it needs {needed[name]} bytes, and the other engines need "
                f"{least_bytes - asleep[name]} of the {budget_bytes} bytes even while all that may sleep do; let more "
                "engines sleep, or use smaller models"
            )
