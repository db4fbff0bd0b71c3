"""The contract of a policy, and the steps that policies are put together from: want, bound, damp, fit to budget.
`decision` makes whole blocks of what they give.

A policy is pure: no clock, no I/O, no memory of its own; the same snapshot gives the same decision. Sizes are bytes of
KV cache, which is what moves; a grant's share of the device follows from it. They are plain lists in the order of the
snapshot's engines, since a decision about a thousand of them is to take no more than a millisecond.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from pydantic import PlainSerializer

from agents.role import Value
from runtime.control.snapshot import Snapshot
from runtime.engines.grant import Grant

Sizes = list[float]
"""Bytes of KV cache of every engine, in the snapshot's order."""


class Reasons(Mapping[str, str]):
    """A reason for every engine, put into words when it is read. `word` is a pure function of the engine's place."""

    def __init__(self, engines: Mapping[str, object], word: Callable[[int], str]) -> None:
        self._engines = engines
        self._word = word

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {engine: place for place, engine in enumerate(self._engines)}

    def __getitem__(self, engine: str) -> str:
        return self._word(self._places[engine])

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)


Worded = Annotated[Mapping[str, str], PlainSerializer(dict, return_type=dict[str, str])]
"""Reasons in a record, which are put into words where the record is written."""


@dataclass(frozen=True)
class Decision:
    """A grant and a reason for every engine; "no change" has a reason too."""

    grants: Mapping[str, Grant] = field(default_factory=dict)
    reasons: Worded = field(default_factory=dict)


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
    return [
        low
        if size < (low := view.limits.kv_floor_bytes)
        else high
        if size > (high := view.limits.kv_ceiling_bytes)
        else size
        for view, size in zip(snapshot.views, wanted, strict=True)
    ]


def damp(snapshot: Snapshot, wanted: Sizes, least: float) -> Sizes:
    """Leave an engine as it is where the change is less than that part of what it has."""
    return [
        has if -least * (has := view.kv_cache_bytes) < size - has < least * has else size
        for view, size in zip(snapshot.views, wanted, strict=True)
    ]


def fit(snapshot: Snapshot, wanted: Sizes) -> Sizes:
    """Within the budget: where it does not hold them all, everything above the floors is cut in proportion."""
    whole = sum(wanted)
    if whole <= snapshot.movable_bytes:
        return wanted
    floors = [view.limits.kv_floor_bytes for view in snapshot.views]
    least = sum(floors)
    part = max(snapshot.movable_bytes - least, 0) / (whole - least) if whole > least else 0.0
    return [floor + (size - floor) * part for floor, size in zip(floors, wanted, strict=True)]


def whole_blocks(snapshot: Snapshot, sizes: Sizes) -> Sizes:
    """In whole blocks: what an engine would have a part of one for goes on to the next, until it makes one."""
    found, over = [], 0.0
    for view, size in zip(snapshot.views, sizes, strict=True):
        limits, whole = view.limits, size
        if block := limits.block_bytes:
            there_is = size + over
            most = high if there_is > (high := limits.kv_ceiling_bytes) else there_is
            whole = low if (rounded := most - most % block) < (low := limits.kv_floor_bytes) else rounded
            over = there_is - whole
        found.append(whole)
    return found


def decision(snapshot: Snapshot, sizes: Sizes, word: Callable[[int], str]) -> Decision:
    """Return the decision that gives every engine its size in whole blocks, at full concurrency.

    `sizes` are within the engines' bounds and, together, the budget. `word` returns the reason for the engine at a
    place in the snapshot's order.
    """
    grants = {}
    for view, size in zip(snapshot.views, whole_blocks(snapshot, sizes), strict=True):
        limits, has = view.limits, view.grant
        if size == view.kv_cache_bytes and has.max_active_seqs == limits.seqs_ceiling:
            grants[view.name] = has
        else:
            grants[view.name] = Grant(limits.share(int(size)), limits.seqs_ceiling, limits.step_tokens_ceiling)
    return Decision(grants, Reasons(snapshot.engines, word))


def unchanged(snapshot: Snapshot, reason: str) -> Decision:
    """Return the decision that leaves every grant as it is.

    If a cut of the budget leaves less than the engines hold, shrink them with `fit`.
    """
    sizes = [float(view.kv_cache_bytes) for view in snapshot.views]
    if sum(sizes) > snapshot.movable_bytes:
        return decision(snapshot, fit(snapshot, bound(snapshot, sizes)), lambda place: f"{reason}; the budget was cut")
    return Decision({view.name: view.grant for view in snapshot.views}, dict.fromkeys(snapshot.engines, reason))


def mib(nbytes: float) -> str:
    """Bytes as a reason says them."""
    return f"{nbytes / (1 << 20):.1f} MiB"
