"""The plan of what an agent runs, and the agent's answer to a head."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from runtime.cluster import wire
from runtime.config import Config, Control, PolicyChoice, ResidencyChoice
from runtime.control.snapshotter import EngineRequirements
from runtime.devices.placement import Placement
from runtime.engines.fleet import Measured
from runtime.engines.spec import EngineSpec


@dataclass(frozen=True)
class Timeouts:
    """Timeouts between the head and an agent, in seconds.

    - `lost_s`: a side that has been silent for longer counts as lost, and the calls between them fail.
    - `orphan_s`: an agent without a head ends after this time.
    """

    lost_s: float = 1.0
    orphan_s: float = 300.0


@dataclass(frozen=True)
class Common:
    """The part of the configuration that all agents share. Agents with the same fingerprint can serve the same head.

    - `specs`, `requirements`: of each engine, by its name; `may_sleep`: the engines that can be put to sleep.
    - `devices`: the devices of each node.
    - `memory_bytes`, `kv_cache_bytes`, `host_bytes`: see devices.start.Start.
    """

    specs: Mapping[str, EngineSpec]
    requirements: Mapping[str, EngineRequirements]
    may_sleep: tuple[str, ...]
    control: Control
    residency: ResidencyChoice
    memory_bytes: int | None = None
    kv_cache_bytes: int | None = None
    host_bytes: int | None = None
    timeouts: Timeouts = Timeouts()
    devices: tuple[int | tuple[int, ...], ...] | str = (0,)

    @classmethod
    def of(
        cls,
        config: Config,
        specs: Mapping[str, EngineSpec],
        may_sleep: Collection[str],
        requirements: Mapping[str, EngineRequirements],
        timeouts: Timeouts,
    ) -> "Common":
        """Return the part of a configuration that agents need."""
        return cls(
            specs,
            requirements,
            tuple(may_sleep),
            config.control,
            config.residency.policy,
            config.device.memory_bytes,
            config.device.kv_cache_memory_bytes,
            config.residency.host_memory_bytes,
            timeouts,
            config.devices,
        )

    @property
    def fingerprint(self) -> str:
        """A hash of everything in it, and of the version of the messages."""
        text = json.dumps([wire.VERSION, _COMMON.dump_python(self, mode="json")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """The engines that one agent runs.

    - `devices`: the numbers of each device's GPUs; see devices.selection.select.
    - `placed`: the replicas to start on each device; `absent`: those that can be added later.
    - `folder`: takes the logs of the engines.
    """

    common: Common
    devices: Mapping[str, tuple[int, ...]]
    placed: Placement
    absent: Placement
    folder: str

    def to_json(self) -> bytes:
        """Return the plan as it is sent."""
        return _PLAN.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> "Plan":
        """Read what `to_json` wrote. Raises pydantic.ValidationError."""
        return _PLAN.validate_json(data)


@dataclass(frozen=True)
class Attached:
    """An agent's answer to a head that attaches itself.

    - `epoch`: names the time until the next head attaches itself. Messages of another epoch are ignored.
    - `fingerprint`: of what it runs; None if it runs nothing yet.
    - `measured`: what it knows about the engines.
    - `pulse`: the address at which it holds a connection for as long as its process lives, or None.
    """

    epoch: int
    fingerprint: str | None = None
    pulse: tuple[str, int] | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return it as it is sent."""
        return _ATTACHED.dump_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> "Attached":
        """Read what `to_json` wrote. Raises pydantic.ValidationError."""
        return _ATTACHED.validate_json(data)


_COMMON = TypeAdapter(Common)
_PLAN = TypeAdapter(Plan)
_ATTACHED = TypeAdapter(Attached)
MEASURED = TypeAdapter(dict[str, Measured])
POLICY = TypeAdapter(PolicyChoice)
