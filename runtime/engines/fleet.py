"""All engines of a configuration: started together, kept running, and closed together."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Self

import psutil

from runtime.engines.grant import EngineLimits, Grant
from runtime.engines.handle import EngineHandle, EngineState
from runtime.engines.launcher import Launcher
from runtime.engines.ledger import Ledger, OverBudget
from runtime.engines.sharing import Sharing
from runtime.engines.spec import EngineSpec
from runtime.engines.step_time import StepTime
from runtime.engines.supervised import Patience, SupervisedEngine
from runtime.errors import EngineError

OnState = Callable[[str, EngineState, float], None]
"""Called with an engine's name, the state that it has entered, and the seconds since its fleet began to start."""


@dataclass(frozen=True)
class Measured:
    """The measurements of a replica that has started: its limits, and the seconds that its process takes to start."""

    limits: EngineLimits
    start_s: float


class Fleet:
    """The engines of one device, as an async context manager: entering starts all of them, leaving closes them.

    - `engines`: ready engines by name. An engine that dies is restarted.
    - `sharing`: moves memory between them.

    `device_bytes` is what counts as the whole device; None takes all of its memory. `kv_cache_bytes` limits the KV
    caches of all engines together. Engines in `step_times` take turns on an emulated device, for their step time.
    Engines in `may_sleep` can give their weights back without ending: `host` is the ledger of the copies that they
    leave in host memory; None takes half of the machine's memory. Fleets of one process share a `launcher`. `device`
    has the numbers of its GPUs, as NVML counts, or of emulated ones; empty takes the first GPUs that are visible.
    With `one_at_a_time`, each engine starts alone, is measured and goes to sleep, so that they need not fit together.
    Entering raises EngineError if an engine does not start or if the engines exceed the device: each of them if they
    start one at a time, all together otherwise. All engines are closed then.
    """

    sharing: Sharing

    def __init__(
        self,
        specs: Mapping[str, EngineSpec],
        run_folder: Path,
        on_state: OnState = lambda name, state, seconds: None,
        device_bytes: int | None = None,
        patience: Patience | None = None,
        kv_cache_bytes: int | None = None,
        step_times: Mapping[str, StepTime] | None = None,
        one_at_a_time: bool = False,
        may_sleep: Collection[str] = (),
        host: Ledger | None = None,
        launcher: Launcher | None = None,
        device: tuple[int, ...] = (),
    ) -> None:
        self.engines: dict[str, EngineHandle] = {}
        self._specs = specs
        self._device_bytes = device_bytes
        self._kv_cache_bytes = kv_cache_bytes
        self._step_times = step_times or {}
        self._one_at_a_time = one_at_a_time
        self._moving = asyncio.Lock()
        self._may_sleep = may_sleep
        self._host = host or Ledger(psutil.virtual_memory().total // 2)
        self._launcher = launcher
        self._device = device
        self._patience = patience
        self._run_folder = run_folder
        self._on_state = on_state
        self._started_s = time.monotonic()
        self._knows_device = bool(specs)  # otherwise another device's size counts until an engine has started
        self._owned = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._started_s = time.monotonic()
        async with AsyncExitStack() as owned:
            launcher = self._launcher or owned.enter_context(Launcher(self._specs.values(), self._run_folder))
            self._reports = launcher.reports
            for name in self._specs:
                launcher.reports[name] = partial(self._report, name)
                self._report(name, EngineState.STARTING)
            module = await launcher.prepare()
            owned.push_async_callback(self._close)
            self._make = partial(self._supervised, module=module, folder=launcher.folder)
            for name, spec in self._specs.items():
                self.engines[name] = self._make(name, spec)
            await (self._start_one_at_a_time() if self._one_at_a_time else self._start())
            self.sharing = Sharing(self.engines, self._ledger())
            owned.push_async_callback(self.sharing.close)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._owned.aclose()

    def log(self, name: str) -> Path:
        """Return the path of an engine's own log file."""
        return self._run_folder / f"engine-{name}.log"

    @property
    def supervised(self) -> dict[str, SupervisedEngine]:
        """Return the engines by name, typed as SupervisedEngine."""
        return {name: engine for name, engine in self.engines.items() if isinstance(engine, SupervisedEngine)}

    def add_absent(self, name: str, spec: EngineSpec, replica: Measured) -> None:
        """Add an engine that has no process and that can be woken, like another replica, which has started."""
        engine = self._make(name, spec)
        engine.begin_absent(replica.limits, replica.start_s)
        self.engines[name] = engine
        self._reports[name] = partial(self._report, name)
        ledger = self.sharing.ledger
        ledger.record(name, 0)
        if not self._knows_device:
            ledger.set_full_budget(replica.limits.device_bytes)

    def _supervised(self, name: str, spec: EngineSpec, module: ModuleType, folder: Path) -> SupervisedEngine:
        def make(grant: Grant | None) -> EngineHandle:
            engine: EngineHandle = module.VllmEngine(
                name,
                spec,
                self.log(name),
                folder,
                self._device_bytes,
                grant,
                self._step_times.get(name),
                name in self._may_sleep,
                self._one_at_a_time,
                self._device,
            )
            return engine

        return SupervisedEngine(name, make, partial(self._report, name), self._patience, self._moving, self._host)

    async def _start(self) -> None:
        """Start all engines at the same time.

        Each starts with the smallest KV cache and grows to its share once it has measured its own memory, so that what
        the other engines load meanwhile is not counted as its own.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for name, engine in self.engines.items():
                    group.create_task(engine.start(), name=f"start {name}")
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _start_one_at_a_time(self) -> None:
        """Start each engine, which measures its memory, and put it to sleep before the next one starts."""
        for engine in self.engines.values():
            await engine.start()
            await engine.sleep()

    def _ledger(self) -> Ledger:
        """Return a ledger with the engines' claims. Raise EngineError if they exceed the budget together."""
        limits = [engine.limits for engine in self.engines.values()]
        budget_bytes = min((engine_limits.device_bytes for engine_limits in limits), default=0)
        if self._kv_cache_bytes is not None:
            fixed_bytes = sum(engine_limits.fixed_bytes for engine_limits in limits)
            budget_bytes = min(budget_bytes, fixed_bytes + self._kv_cache_bytes)
        ledger = Ledger(budget_bytes)
        for name, engine in self.engines.items():
            try:
                ledger.claim(name, engine.held_bytes)
            except OverBudget as error:
                raise EngineError(
                    f"the engines together do not fit the device: {error}; lower gpu_memory_utilization (or"
                    " kv_cache_memory_bytes) of an engine, or raise device.kv_cache_memory_bytes if it is set"
                ) from None
        return ledger

    async def _close(self) -> None:
        engines, self.engines = self.engines, {}
        await asyncio.gather(*(engine.close() for engine in engines.values()))
        for name in engines:
            self._report(name, EngineState.CLOSED)

    def _report(self, name: str, state: EngineState) -> None:
        if state is EngineState.READY and not self._knows_device:
            self._knows_device = True
            self.sharing.ledger.set_full_budget(self.engines[name].limits.device_bytes)
        self._on_state(name, state, time.monotonic() - self._started_s)
