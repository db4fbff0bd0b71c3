"""The interface of allocation policies, and the steps that policies share.

A policy is pure: no clock, no I/O, no state between decisions. The same snapshot always gives the same decision.

Policies compute bytes of KV cache, because only the KV cache can be resized; an engine's share of the device follows
from it. Sizes are plain lists in the order of the snapshot's engines, because these are the fastest in decisions about
many engines. A policy usually computes what each engine wants, applies `bound`, `damp` and `fit`, and
returns `decision`, which rounds to whole KV blocks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Annotated

from pydantic import PlainSerializer

from agents.role import Value
from runtime.control import pauses
from runtime.control.snapshot import Snapshot
from runtime.engines.grant import Grant

Sizes = list[float]
"""Bytes of KV cache for every engine, in the snapshot's order."""


class Reasons(Mapping[str, str]):
    """Reasons by engine, formatted only when they are read.

    `reason` returns the text for an engine's index in the snapshot's order. It must be a pure function.
    """

    def __init__(self, engines: Mapping[str, object], reason: Callable[[int], str]) -> None:
        self._engines = engines
        self._reason = reason

    @cached_property
    def _index(self) -> Mapping[str, int]:
        return {engine: index for index, engine in enumerate(self._engines)}

    def __getitem__(self, engine: str) -> str:
        return self._reason(self._index[engine])

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)


Worded = Annotated[Mapping[str, str], PlainSerializer(dict, return_type=dict[str, str])]
"""The type of reasons in a record: `Reasons` are formatted when the record is written."""


@dataclass(frozen=True)
class Decision:
    """A grant and a reason for every engine. An engine whose grant does not change has a reason too."""

    grants: Mapping[str, Grant] = field(default_factory=dict)
    reasons: Worded = field(default_factory=dict)


class Configurable:
    """A rule that a configuration chooses. `Options` are its keys in the configuration."""

    class Options(Value):
        """The options of a rule that has none."""

    def __init__(self, options: Value) -> None:
        self.options = options


class Policy(Configurable, ABC):
    """An allocation rule."""

    @abstractmethod
    def decide(self, snapshot: Snapshot) -> Decision:
        """Return grants for the snapshot's engines that fit its budget together, in O(N) of the number of engines."""


# These loops and `whole_blocks` avoid min() and max(): their calls made waterfill's decision about 1,000 engines slower
# (3.2 instead of 2.3 ms on an AMD EPYC, `python scripts/measure_control.py tick`).


def at_most(sizes: Sequence[float], caps: Sequence[float]) -> Sizes:
    """Cut each size to its cap."""
    return [cap if size > cap else size for size, cap in zip(sizes, caps, strict=True)]  # noqa: FURB136


def at_least(sizes: Sequence[float], floors: Sequence[float]) -> Sizes:
    """Raise each size to its floor."""
    return [floor if size < floor else size for size, floor in zip(sizes, floors, strict=True)]  # noqa: FURB136


def bound(snapshot: Snapshot, wanted: Sizes) -> Sizes:
    """Raise each size to its engine's floor or cut it to the ceiling. NaN stays NaN, so that it is refused later."""
    floors = [view.limits.kv_floor_bytes for view in snapshot.views]
    ceilings = [view.limits.kv_ceiling_bytes for view in snapshot.views]
    return at_least(at_most(wanted, ceilings), floors)


def damp(snapshot: Snapshot, wanted: Sizes, least: float) -> Sizes:
    """Keep the current size of every engine that would change by less than the fraction `least` of it.

    A size below the engine's floor is not kept: a policy may have raised the floor.
    """
    return [
        view.kv_cache_bytes
        if abs(size - view.kv_cache_bytes) < least * view.kv_cache_bytes
        and view.kv_cache_bytes >= view.limits.kv_floor_bytes
        else size
        for view, size in zip(snapshot.views, wanted, strict=True)
    ]


def fit(snapshot: Snapshot, wanted: Sizes) -> Sizes:
    """Return sizes within the budget: if `wanted` exceeds it, cut everything above the floors in proportion."""
    total = sum(wanted)
    if total <= snapshot.movable_bytes:
        return wanted
    floors = [view.limits.kv_floor_bytes for view in snapshot.views]
    least = sum(floors)
    scale = max(snapshot.movable_bytes - least, 0) / (total - least) if total > least else 0.0
    return [floor + (size - floor) * scale for floor, size in zip(floors, wanted, strict=True)]


def whole_blocks(snapshot: Snapshot, sizes: Sizes) -> Sizes:
    """Round sizes down to whole KV blocks within floors and ceilings; carry what is cut off to the next engine."""
    rounded, carried = [], 0.0
    for view, size in zip(snapshot.views, sizes, strict=True):
        limits = view.limits
        if not limits.block_bytes:
            rounded.append(size)
            continue
        available = size + carried
        whole = available
        if whole > limits.kv_ceiling_bytes:
            whole = limits.kv_ceiling_bytes
        whole -= whole % limits.block_bytes
        if whole < limits.kv_floor_bytes:
            whole = limits.kv_floor_bytes
        carried = available - whole
        rounded.append(whole)
    return rounded


def decision(
    snapshot: Snapshot,
    sizes: Sizes,
    reason: Callable[[int], str],
    sequences: Mapping[int, int] = MappingProxyType({}),
    step_tokens: Mapping[int, int] = MappingProxyType({}),
    preempted: Container[int] = (),
) -> Decision:
    """Return the decision that gives every engine its size in whole blocks.

    `sizes` must be within the engines' bounds and, together, within the budget. `reason` returns the reason for the
    engine at an index in the snapshot's order. Concurrency and step tokens are at their ceilings, except those that
    `sequences` and `step_tokens` give by index. `preempted` has the indices of the engines whose running requests are
    preempted.
    """
    grants = {}
    for index, (view, size) in enumerate(zip(snapshot.views, whole_blocks(snapshot, sizes), strict=True)):
        limits, current = view.limits, view.grant
        seqs = sequences.get(index, limits.seqs_ceiling)
        tokens = step_tokens.get(index, limits.step_tokens_ceiling)
        share = current.gpu_memory_utilization if size == view.kv_cache_bytes else limits.share(int(size))
        grants[view.name] = Grant(share, seqs, tokens, index in preempted)
    return Decision(grants, Reasons(snapshot.engines, reason))


def unchanged(snapshot: Snapshot, reason: str) -> Decision:
    """Return the decision that keeps every engine's memory and lets it admit requests.

    If the budget was cut below what the engines hold, shrink them with `fit`.
    """
    sizes = [float(view.kv_cache_bytes) for view in snapshot.views]
    if sum(sizes) > snapshot.movable_bytes:
        sizes = fit(snapshot, bound(snapshot, sizes))
        return decision(snapshot, sizes, lambda index: f"{reason}; shrunk because the budget was cut")
    grants = {view.name: pauses.admitting(view.grant, view.limits) for view in snapshot.views}
    return Decision(grants, dict.fromkeys(snapshot.engines, reason))


def mib(nbytes: float) -> str:
    """Format bytes for a reason: "12.5 MiB"."""
    return f"{nbytes / (1 << 20):.1f} MiB"
