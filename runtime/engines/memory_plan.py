"""Plans how memory moves between the engines of one device.

Pure functions from claims, grants, limits and budget to who shrinks, who grows by how much now, and who waits.
`sharing` carries the plans out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from runtime.engines.grant import EngineLimits, Grant

STEP_BYTES = 1 << 20
"""A recipient whose whole grant does not fit yet grows by at least this much at a time."""


@dataclass(frozen=True)
class Position:
    """One engine before a decision.

    - `claimed_bytes`: its claim in the ledger.
    - `settled_bytes`: what it will hold when its present grant, possibly a deferred one, is fully in force.
    - `unavailable`: why the engine cannot be resized now, or None if it can.
    """

    limits: EngineLimits
    claimed_bytes: int
    settled_bytes: int
    unavailable: str | None = None


@dataclass(frozen=True)
class Plan:
    """The steps that carry out a decision.

    Either all grants are in `rejected`, each with a reason, or each is in `shrink` or in `grow`. Engines in `shrink`
    release memory first. Then `plan_growth` divides it among the engines in `grow`. These include engines whose memory
    stays the same and whose concurrency changes.
    """

    rejected: Mapping[str, str] = field(default_factory=dict)
    shrink: Mapping[str, Grant] = field(default_factory=dict)
    grow: Mapping[str, Grant] = field(default_factory=dict)


@dataclass(frozen=True)
class Growth:
    """The part of a recipient's growth that the free memory allows.

    - `now`: the grant to apply now, or None if less than the smallest step is free.
    - `missing_bytes`: what is missing for the whole grant; zero or less if `now` is the whole grant.
    """

    now: Grant | None
    missing_bytes: int

    @property
    def complete(self) -> bool:
        """Return True if `now` is the whole grant."""
        return self.missing_bytes <= 0


def plan(positions: Mapping[str, Position], grants: Mapping[str, Grant], budget_bytes: int) -> Plan:
    """Return who shrinks and who grows, or why the decision is impossible.

    A decision is rejected as a whole if one of its grants is impossible, or if an engine would grow and all engines
    together would exceed the budget once everything has settled. A decision that only shrinks engines is possible even
    if the budget was cut below what they hold.
    """
    reasons = {name: reason for name, grant in grants.items() if (reason := _impossible(positions, name, grant))}
    if reasons:
        other = "another grant of the decision was rejected"
        return Plan(rejected={name: reasons.get(name, other) for name in grants})
    targets = {name: _held_bytes(positions[name].limits, grant) for name, grant in grants.items()}
    total = sum(targets.get(name, position.settled_bytes) for name, position in positions.items())
    grows = any(target > positions[name].claimed_bytes for name, target in targets.items())
    if grows and total > budget_bytes:
        return Plan(
            rejected=dict.fromkeys(grants, f"the engines would hold {total} bytes; the budget is {budget_bytes}")
        )
    shrink = {name: grant for name, grant in grants.items() if targets[name] < positions[name].claimed_bytes}
    return Plan(shrink=shrink, grow={name: grant for name, grant in grants.items() if name not in shrink})


def plan_growth(
    grants: Mapping[str, Grant],
    limits: Mapping[str, EngineLimits],
    claims: Mapping[str, int],
    free_bytes: int,
    step_bytes: int = STEP_BYTES,
) -> dict[str, Growth]:
    """Divide the free memory among recipients, in the order of `grants`.

    Each recipient gets its whole grant if it fits. Otherwise it gets all that is free, or nothing if that is less than
    `step_bytes`. The claims after these growths exceed `claims` by at most `free_bytes` in total. A negative
    `free_bytes` counts as zero.
    """
    free_bytes = max(free_bytes, 0)
    growths: dict[str, Growth] = {}
    for name, grant in grants.items():
        needed_bytes = _held_bytes(limits[name], grant) - claims[name]
        now: Grant | None = None
        if needed_bytes <= free_bytes:
            now = grant
        elif free_bytes >= step_bytes:
            share = (claims[name] + free_bytes) / limits[name].device_bytes
            now = replace(grant, gpu_memory_utilization=share)
        growths[name] = Growth(now, needed_bytes - free_bytes)
        if now is not None:
            free_bytes -= max(0, min(needed_bytes, free_bytes))
    return growths


def _impossible(positions: Mapping[str, Position], name: str, grant: Grant) -> str | None:
    if name not in positions:
        return f"there is no engine {name!r}; there are {', '.join(positions)}"
    return positions[name].unavailable or positions[name].limits.violation(grant)


def _held_bytes(limits: EngineLimits, grant: Grant) -> int:
    return limits.held_bytes(grant.gpu_memory_utilization)
