"""Pins: grants at which a user holds engines, and which of them fit a snapshot. Nothing here moves memory."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from runtime.control.pauses import admitting, is_paused
from runtime.control.snapshot import Snapshot
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineHandle, EngineState
from runtime.errors import InputError, NotFound

NEVER_ADMITS = "max_active_seqs 0 would pause the engine for as long as it is pinned; give at least 1"


@dataclass(frozen=True)
class Pinned:
    """Pins checked against a snapshot: the grants in force, by engine, and why each of the other pins does not fit."""

    in_force: Mapping[str, Grant]
    unfit: Mapping[str, str]

    def rest(self, snapshot: Snapshot) -> Snapshot:
        """Return what is left for policies: the engines without a pin in force, and their budget."""
        if not self.in_force:
            return snapshot
        held = sum(
            snapshot.engines[name].limits.held_bytes(grant.gpu_memory_utilization)
            for name, grant in self.in_force.items()
        )
        views = {name: view for name, view in snapshot.engines.items() if name not in self.in_force}
        return replace(snapshot, engines=views, budget_bytes=snapshot.budget_bytes - held)


def fit(snapshot: Snapshot, pins: Mapping[str, Grant]) -> Pinned:
    """Put pins in force in their order, as long as the other engines keep their floors and the pins before it.

    Leave out a pin whose engine is not in the snapshot. A pin that fitted may stop fitting, and may fit again later:
    the budget, an engine's floor and what it holds besides its KV cache can all change while the pin exists.
    """
    if not pins:
        return Pinned({}, {})
    spare_bytes = snapshot.budget_bytes - sum(
        view.limits.fixed_bytes + view.limits.kv_floor_bytes for view in snapshot.engines.values()
    )
    in_force: dict[str, Grant] = {}
    unfit: dict[str, str] = {}
    for name, grant in pins.items():
        if name not in snapshot.engines:
            continue
        limits = snapshot.engines[name].limits
        if violation := limits.violation(grant) or (is_paused(grant) and NEVER_ADMITS):
            unfit[name] = violation
            continue
        above_floor = limits.kv_cache_bytes(grant.gpu_memory_utilization) - limits.kv_floor_bytes
        if above_floor > max(spare_bytes, 0):
            floor = limits.share(limits.kv_floor_bytes)
            most = max(_rounded_down(limits.share(limits.kv_floor_bytes + max(spare_bytes, 0))), floor)
            unfit[name] = (
                f"gpu_memory_utilization {grant.gpu_memory_utilization:g} would leave the other engines less than their"
                f" floors and pins; at most {most} fits"
            )
            continue
        in_force[name] = grant
        spare_bytes -= above_floor
    return Pinned(in_force, unfit)


def current_grant(engines: Mapping[str, EngineHandle], silent: Collection[str], engine: str) -> Grant:
    """Return an engine's grant, with its admission open. `silent` engines have not answered their last grant.

    Raises NotFound, or InputError if the engine takes no grants now.
    """
    require(engines, engine)
    stats = engines[engine].stats()
    is_silent = engine in silent
    if is_silent or stats.state is not EngineState.READY or stats.grant is None:
        state = "silent" if is_silent else stats.state
        raise InputError(f"engine {engine} is {state} and takes no grant now; pin it once it is ready")
    return admitting(stats.grant, engines[engine].limits)


def require(engines: Mapping[str, EngineHandle], engine: str) -> None:
    """Raise NotFound if there is no such engine."""
    if engine not in engines:
        raise NotFound(f"there is no engine {engine[:100]!r}; the engines are {', '.join(engines)}")


def with_pin(snapshot: Snapshot, pins: Mapping[str, Grant], engine: str, grant: Grant) -> dict[str, Grant]:
    """Return the pins with one more as the newest, in place of an older one of its engine.

    Raises InputError if the new pin does not fit beside the others.
    """
    pinned = {name: held for name, held in pins.items() if name != engine} | {engine: grant}
    if violation := fit(snapshot, pinned).unfit.get(engine):
        raise InputError(f"engine {engine}: {violation}")
    return pinned


def _rounded_down(share: float) -> float:
    """Round to four digits, downwards, so that the share named in an error message does fit."""
    return math.floor(share * 1e4) / 1e4
