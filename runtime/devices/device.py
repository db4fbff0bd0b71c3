"""One device: its engines, the controller that resizes them, and the keeper that puts them to sleep and wakes them."""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

from runtime.control.controller import Controller
from runtime.control.snapshotter import Snapshotter
from runtime.devices.handle import Terms
from runtime.engines.handle import EngineHandle
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import SupervisedEngine
from runtime.residency.keeper import Keeper, Rules
from runtime.telemetry.reading import Reading

ADMIT_S = 60.0
"""A new replica waits for memory for at most so many seconds."""


@dataclass(frozen=True)
class StartedEngines:
    """The engines of one device of this process after their start.

    - `engines`: by the name of the replica.
    - `sharing`: moves memory between them.
    - `reading`: returns the latest telemetry. Without it, snapshots have no figures of the device.
    """

    engines: Mapping[str, EngineHandle]
    sharing: Sharing
    reading: Callable[[], Reading] | None = None

    def device(self, name: str, terms: Terms) -> "Device":
        """Return the device, controlled on these terms while it is entered."""
        return Device(name, self, terms)


class Device:
    """A device of this process: `controller` resizes its engines, `keeper` puts them to sleep and wakes them."""

    lost = False

    def __init__(self, name: str, started: StartedEngines, terms: Terms) -> None:
        self.name = name
        self.engines = started.engines
        self.sharing = started.sharing
        self.controller = Controller(
            self.engines,
            self.sharing,
            Snapshotter(self.engines, terms.forecast, terms.requirements, started.reading),
            terms.policies.shares,
            every_s=terms.control.every_s,
            grace_s=terms.control.grace_s,
            shadow=terms.policies.shadow,
            log=terms.log,
            publish=terms.publish,
            device=name,
        )
        self._sleeps = bool(terms.may_sleep)
        rules = {
            engine: Rules(engine in terms.may_sleep, required.priority)
            for engine, required in terms.requirements.items()
        }
        self.keeper = Keeper(
            self.engines,
            self.sharing,
            terms.forecast,
            terms.call_times,
            terms.policies.residency,
            rules,
            self.controller.wake,
        )

    async def add(self, replica: str) -> None:
        needed_bytes = self.engines[replica].limits.smallest_bytes
        if self.sharing.ledger.free < needed_bytes:
            self.controller.wake(f"engine {replica} is added")
        await self.sharing.wake(replica, ADMIT_S)
        self.controller.wake(f"engine {replica} has started")

    async def remove(self, replica: str) -> None:
        engine = self.engines[replica]
        assert isinstance(engine, SupervisedEngine), replica
        await engine.leave()
        await self.sharing.release(replica, 0)
        self.controller.wake(f"engine {replica} is gone")

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as owned:
            await owned.enter_async_context(self.controller)
            if self._sleeps:
                await owned.enter_async_context(self.keeper)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._owned.aclose()
