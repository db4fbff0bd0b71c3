"""Starts the engines of a configuration, each replica on its device."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import psutil

from runtime.config import Config
from runtime.devices.placement import place, spares
from runtime.devices.selection import select
from runtime.engines.fleet import Fleet, OnState
from runtime.engines.handle import EngineState
from runtime.engines.launcher import Launcher
from runtime.engines.ledger import Ledger
from runtime.engines.replicas import engine_of
from runtime.engines.spec import EngineSpec, oversubscribe
from runtime.engines.step_time import StepTime
from runtime.errors import EngineError


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
    devices = select(config, gpus)
    placed = place(specs, [*devices], may_sleep)
    absent = spares(specs, placed)
    host_bytes = config.residency.host_memory_bytes
    host = Ledger(psutil.virtual_memory().total // 2 if host_bytes is None else host_bytes)
    fleets = {
        device: Fleet(
            of_device,
            folder,
            on_state,
            config.device.memory_bytes,
            kv_cache_bytes=config.device.kv_cache_memory_bytes,
            step_times={
                name: step_times[engine_of(name)]
                for name in (*of_device, *absent[device])
                if engine_of(name) in step_times
            },
            one_at_a_time=oversubscribe(of_device.values()),
            may_sleep=[name for name in (*of_device, *absent[device]) if engine_of(name) in may_sleep],
            host=host,
            launcher=launcher,
            device=devices[device],
        )
        for device, of_device in placed.items()
        if of_device or absent[device]
    }
    await _enter_all(owned, [*fleets.values()])
    started = {engine_of(name): engine for fleet in fleets.values() for name, engine in fleet.supervised.items()}
    for device, of_device in absent.items():
        for name, spec in of_device.items():
            fleets[device].add_absent(name, spec, started[engine_of(name)])
    for fleet in fleets.values():
        _check_that_each_can_wake(fleet, [name for name in fleet.engines if engine_of(name) in may_sleep])
    return fleets


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


def _check_that_each_can_wake(fleet: Fleet, may_sleep: Collection[str]) -> None:
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
