"""The interface to one device, of this process or of another one."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from runtime.config import Control
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.controller import Counts
from runtime.control.decision_log import DecisionLog, Record
from runtime.control.forecast import ExpectedRequests
from runtime.control.snapshot import Snapshot
from runtime.control.snapshotter import EngineRequirements
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineHandle
from runtime.engines.ledger import Ledger
from runtime.events import Event
from runtime.residency import keeper
from runtime.residency.call_times import ExpectedTimes
from runtime.residency.policy import ResidencyPolicy

Publish = Callable[[Record], None]
"""A function that the controllers call with the record of each decision."""


@dataclass(frozen=True)
class Policies:
    """The policies of one device. `shadow` decides too, and its decisions are only logged."""

    shares: ContainedPolicy
    shadow: ContainedPolicy | None
    residency: ResidencyPolicy


@dataclass(frozen=True)
class Terms:
    """The terms by which a device is controlled: what its team expects and requires of its engines, and the policies.

    - `forecast`, `call_times`: which calls its engines can expect, and when.
    - `requirements`: what the seats of each engine require; `may_sleep`: the engines that can be put to sleep.
    - `publish`, `log`: where the records of its decisions go.
    """

    forecast: ExpectedRequests
    call_times: ExpectedTimes
    requirements: Mapping[str, EngineRequirements]
    may_sleep: Collection[str]
    control: Control
    policies: Policies
    publish: Publish = lambda record: None
    log: DecisionLog | None = None


class DeviceController(Protocol):
    """The interface to a device's controller. Controller describes the methods."""

    counts: Counts

    @property
    def engines(self) -> Mapping[str, EngineHandle]: ...
    @property
    def paused(self) -> bool: ...
    @property
    def policy(self) -> str: ...
    @property
    def snapshot(self) -> Snapshot | None: ...
    @property
    def pinned(self) -> Mapping[str, Grant]: ...
    @property
    def unfit_pins(self) -> Mapping[str, str]: ...
    def current_grant(self, engine: str) -> Grant: ...
    def look(self) -> None: ...
    def on_event(self, event: Event) -> None: ...
    def pause(self) -> None: ...
    def pin(self, engine: str, grant: Grant) -> None: ...
    def resume(self) -> None: ...
    def unpin(self, engine: str) -> None: ...
    def use(self, policy: ContainedPolicy, budget_bytes: int | None = None) -> None: ...


class DeviceKeeper(Protocol):
    """The interface to a device's keeper. Keeper describes the methods."""

    @property
    def counts(self) -> keeper.Counts: ...
    @property
    def policy(self) -> str: ...
    async def begin(self, policy: ResidencyPolicy) -> None: ...
    def expect_job(self) -> float: ...
    def look(self) -> None: ...
    def wait_of_job_s(self) -> float: ...


class DeviceMemory(Protocol):
    """The memory of a device's engines. Sharing describes the members."""

    @property
    def ledger(self) -> Ledger: ...
    @property
    def reserved_bytes(self) -> int: ...


class DeviceHandle(Protocol):
    """A device whose engines have started. As an async context manager it controls them.

    - `engines`: by the name of the replica.
    - `lost`: whether it is on a machine that does not answer.
    """

    @property
    def name(self) -> str: ...
    @property
    def engines(self) -> Mapping[str, EngineHandle]: ...
    @property
    def controller(self) -> DeviceController: ...
    @property
    def keeper(self) -> DeviceKeeper: ...
    @property
    def sharing(self) -> DeviceMemory: ...
    @property
    def lost(self) -> bool: ...

    async def add(self, replica: str) -> None:
        """Start an absent replica. The others shrink until there is memory for it. Raises EngineError."""

    async def remove(self, replica: str) -> None:
        """Let a replica finish the requests that have a token, then end it. Other replicas serve its other requests.

        Raises EngineError if it does not stop serving.
        """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...


class Startable(Protocol):
    """The engines of one device after their start, which are not controlled yet."""

    @property
    def engines(self) -> Mapping[str, EngineHandle]: ...
    def device(self, name: str, terms: Terms) -> DeviceHandle:
        """Return the device, controlled on these terms while it is entered."""
