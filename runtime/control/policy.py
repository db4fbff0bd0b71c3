"""The contract of a policy, and the four steps that policies are put together from: want, bound, damp, fit to budget.

A policy is pure: no clock, no I/O, no memory of its own; the same snapshot gives the same decision. Sizes are bytes of
KV cache, which is what moves; a grant's share of the device follows from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from agents.role import Value
from runtime.control.snapshot import Snapshot
from runtime.engines.base import Grant

Sizes = dict[str, float]
"""Bytes of KV cache by engine."""


class Reasons(Mapping[str, str]):
    """A reason for every engine, put into words when it is read: most never are."""

    def __init__(self, engines: Mapping[str, object], word: Callable[[str], str]) -> None:
        self._engines = engines
        self._word = word

    def __getitem__(self, engine: str) -> str:
        if engine not in self._engines:
            raise KeyError(engine)
        return self._word(engine)

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)


@dataclass(frozen=True)
class Decision:
    """A grant and a reason for every engine; "no change" has a reason too."""

    grants: Mapping[str, Grant] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


class Policy(ABC):
    """Decides who gets how much. `Options` are its settings in a configuration."""

    class Options(Value):
        """A policy without settings."""

    def __init__(self, options: Value) -> None:
        self.options = options

    @abstractmethod
    def decide(self, snapshot: Snapshot) -> Decision:
        """A grant for every engine of the snapshot, together within its budget; O(N) in engines."""


def bound(snapshot: Snapshot, wanted: Sizes) -> Sizes:
    """No less than each engine's floor, no more than its ceiling."""
    sizes = {}
    for name, view in snapshot.engines.items():
        limits, size = view.limits, wanted[name]
        if size < limits.kv_floor_bytes:
            size = limits.kv_floor_bytes
        elif size > limits.kv_ceiling_bytes:
            size = limits.kv_ceiling_bytes
        sizes[name] = size
    return sizes


def damp(snapshot: Snapshot, wanted: Sizes, least: float) -> Sizes:
    """Leave an engine as it is where the change is less than that part of what it has."""
    sizes = {}
    for name, view in snapshot.engines.items():
        size, has = wanted[name], view.kv_cache_bytes
        sizes[name] = has if -least * has < size - has < least * has else size
    return sizes


def fit(snapshot: Snapshot, wanted: Sizes) -> Sizes:
    """Within the budget: where it does not hold them all, everything above the floors is cut in proportion."""
    whole = sum(wanted.values())
    if whole <= snapshot.movable_bytes:
        return wanted
    floors = {name: view.limits.kv_floor_bytes for name, view in snapshot.engines.items()}
    least = sum(floors.values())
    part = max(snapshot.movable_bytes - least, 0) / (whole - least) if whole > least else 0.0
    return {name: floor + (wanted[name] - floor) * part for name, floor in floors.items()}


def decision(snapshot: Snapshot, sizes: Sizes, word: Callable[[str], str]) -> Decision:
    """The decision that gives every engine its size, which is within its bounds, at full concurrency; `word` says
    why."""
    grants = {}
    for name, view in snapshot.engines.items():
        size, limits = int(sizes[name]), view.limits
        unchanged = size == view.kv_cache_bytes and view.grant.max_active_seqs == limits.seqs_ceiling
        grants[name] = (
            view.grant if unchanged else Grant(limits.share(size), limits.seqs_ceiling, limits.step_tokens_ceiling)
        )
    return Decision(grants, Reasons(snapshot.engines, word))


def mib(nbytes: float) -> str:
    """Bytes as a reason says them."""
    return f"{nbytes / (1 << 20):.1f} MiB"
