"""One device: its engines, the controller that resizes them, and the keeper that puts them to sleep and wakes them."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

from runtime.config import Control
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import Controller
from runtime.control.decision_log import DecisionLog, Record
from runtime.control.forecast import ExpectedRequests
from runtime.control.snapshotter import EngineRequirements, Snapshotter
from runtime.engines.handle import EngineHandle
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import SupervisedEngine
from runtime.residency.call_times import ExpectedTimes
from runtime.residency.keeper import Keeper, Rules
from runtime.residency.policy import ResidencyPolicy
from runtime.telemetry.reading import Reading

ADMIT_S = 60.0
"""A new replica waits for memory for at most so many seconds."""
Publish = Callable[[Record], None]
"""A function that the controllers call with the record of each decision."""


@dataclass(frozen=True)
class StartedEngines:
    """The engines of one device after their start.

    - `engines`: by the name of the replica.
    - `sharing`: moves memory between them.
    - `reading`: returns the latest telemetry. Without it, snapshots have no figures of the device.
    """

    engines: Mapping[str, EngineHandle]
    sharing: Sharing
    reading: Callable[[], Reading] | None = None


@dataclass(frozen=True)
class Policies:
    """The policies of one device. `shadow` decides too, and its decisions are only logged."""

    shares: ContainedPolicy
    shadow: ContainedPolicy | None
    residency: ResidencyPolicy


class Device:
    """A device whose engines have started.

    As an async context manager it controls them: `controller` resizes them, and `keeper` puts those in `may_sleep` to
    sleep and wakes them.
    """

    def __init__(
        self,
        name: str,
        started: StartedEngines,
        forecast: ExpectedRequests,
        call_times: ExpectedTimes,
        requirements: Mapping[str, EngineRequirements],
        may_sleep: Collection[str],
        control: Control,
        policies: Policies,
        publish: Publish,
        log: DecisionLog | None,
    ) -> None:
        self.name = name
        self.engines = started.engines
        self.sharing = started.sharing
        self.controller = Controller(
            self.engines,
            self.sharing,
            Snapshotter(self.engines, forecast, requirements, started.reading),
            policies.shares,
            every_s=control.every_s,
            grace_s=control.grace_s,
            shadow=policies.shadow,
            log=log,
            publish=publish,
            device=name,
        )
        self._sleeps = bool(may_sleep)
        rules = {name: Rules(name in may_sleep, terms.priority) for name, terms in requirements.items()}
        self.keeper = Keeper(
            self.engines, self.sharing, forecast, call_times, policies.residency, rules, self.controller.wake
        )

    async def add(self, replica: str) -> None:
        """Start an absent replica. The others shrink until there is memory for it. Raises EngineError."""
        needed_bytes = self.engines[replica].limits.smallest_bytes
        if self.sharing.ledger.free < needed_bytes:
            self.controller.wake(f"engine {replica} is added")
        await self.sharing.wake(replica, ADMIT_S)
        self.controller.wake(f"engine {replica} has started")

    async def remove(self, replica: str) -> None:
        """Let a replica serve what has a token, then end it. Other replicas serve its other requests.

        Raises EngineError if it does not stop to serve.
        """
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
