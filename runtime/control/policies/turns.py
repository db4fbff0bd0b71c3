"""`turns`: serve engines in turns where that finishes more work, and divide memory as `waterfill` does.

A step of an engine with n sequences takes a + b n seconds: `a` is the price of the step, mostly that of reading the
weights, and `b` that of a sequence. A device serves L engines at once at full speed; L is its number of lanes. A round
in which each engine of a set S makes one step takes

    T(S) = max(sum over S of (a + b n) / L, the longest a + b n in S).

While memory is scarce, it holds a certain number of sequences, whoever has them. If three engines share it, each round
pays three times `a` for them. If one engine has all of it, each round pays one. So it can pay to admit requests to some
engines only, to pause the admission of the others, whose running requests finish and leave their memory, and to change
the set as queues change. Whether it pays depends on the costs: with `a` large and L = 1, as on a GPU, turns are nearly
twice as fast for a team of three; with L near the number of engines, as on CPU cores, they gain nothing.

Which set? The one with the greatest value

    V(S) = (sum over S of w n) / T(S),

where n is what fits into the memory that is free for S, shared max-min fairly, and the weight w is the number of the
engine's requests in flight. V is the rate at which S works off the queues, the long ones most. This is the max-weight
rule, which keeps every queue stable that any rule could keep stable.

Three limits keep turns from costing more than they gain:
- All engines are admitted while all needs fit into memory, and unless the best set is `gain` times as good as all.
- A set stays until another is `stay` times as good, because engines that drain work in small batches.
- The controller ends each pause after a few seconds, so that no engine starves.

The present set is not remembered: the grants in the snapshot show it.

Sources: L. Tassiulas and A. Ephremides, "Stability properties of constrained queueing systems and scheduling policies
for maximum throughput in multihop radio networks", 1992 (max-weight); see `waterfill` for the division of memory.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

from pydantic import Field

from runtime.control.policies.waterfill import Waterfill, water_fill
from runtime.control.policy import Decision, Sizes, bound, damp, decision, fit
from runtime.control.snapshot import EngineView, Snapshot

STALLED_S = 2.0
"""An engine that has not completed a step for this long, although requests run, gets no turn."""

Engines = Sequence[int]
"""A set of engines, by their indices in the snapshot's order."""


class Turns(Waterfill):
    """Admit the engines that together work off the most, and give them the memory that they can use."""

    class Options(Waterfill.Options):
        """Options of `turns`."""

        gain: float = Field(
            default=1.2,
            ge=1,
            allow_inf_nan=False,
            description="How many times as good as all engines a set must be before the others are paused.",
        )
        stay: float = Field(
            default=1.2,
            ge=1,
            allow_inf_nan=False,
            description="How many times as good as the present set another must be to replace it.",
        )

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        demand = _Demand(snapshot, bound(snapshot, self.usable(snapshot)))
        chosen = self._choose(demand)
        if len(chosen) == len(demand.live):
            return super().decide(snapshot)
        sizes = demand.divide(chosen)
        sizes = fit(snapshot, damp(snapshot, bound(snapshot, sizes), self.options.damping))
        served = set(chosen)

        def reason(index: int) -> str:
            turn = ", ".join(snapshot.views[other].name for other in chosen[:3]) + ", ..." * (len(chosen) > 3)
            state = "served" if index in served else "paused"
            return f"{snapshot.views[index].in_flight} in flight: {state} in the turn of {turn}"

        return decision(snapshot, sizes, reason, paused=set(range(len(sizes))) - served)

    def _choose(self, demand: "_Demand") -> Engines:
        """Return the engines to admit: all that have work, or the best set."""
        live = demand.live
        if len(live) < 2 or demand.fits:
            return live
        everyone = demand.value(live)
        best, best_value = max(((set_, demand.value(set_)) for set_ in demand.candidates()), key=lambda pair: pair[1])
        if best_value < self.options.gain * everyone:
            return live
        present = [index for index in live if demand.views[index].grant.max_active_seqs]
        if 0 < len(present) < len(live) and demand.value(present) * self.options.stay >= best_value:
            return present
        return best


class _Demand:
    """What the engines of a snapshot need, and what sets of them are worth."""

    def __init__(self, snapshot: Snapshot, needs: Sizes) -> None:
        self.views: Sequence[EngineView] = snapshot.views
        self._snapshot = snapshot
        self._needs = needs
        self._weights = [view.sequence_bytes / view.priority for view in self.views]
        # What an engine keeps while others are served: the memory of its running requests.
        self._kept = [
            float(max(view.limits.kv_floor_bytes, min(view.kv_used_bytes, need)))
            for view, need in zip(self.views, needs, strict=True)
        ]
        self._free_bytes = snapshot.movable_bytes - sum(self._kept)

    @cached_property
    def fits(self) -> bool:
        """Whether memory is enough for all needs."""
        return sum(self._needs) <= self._snapshot.movable_bytes

    @cached_property
    def live(self) -> Engines:
        """The engines that have requests, without those that complete no steps."""
        return [i for i, view in enumerate(self.views) if view.in_flight and view.stalled_s < STALLED_S]

    def candidates(self) -> Iterator[Engines]:
        """Yield the sets to compare: the first 1, 2, ... engines in the order of their value alone.

        From 8 on, the number of engines doubles, so that all sets together have O(N).
        """
        order = sorted(self.live, key=lambda index: -self.value([index]))
        count = 1
        while count < len(order):
            yield order[:count]
            count += 1 if count < 8 else count

    def value(self, chosen: Engines) -> float:
        """Return V(S), in requests squared a second."""
        longest_s = together_s = worked = 0.0
        for index, size in zip(chosen, self._fill(chosen), strict=True):
            view = self.views[index]
            sequences = min(size / view.sequence_bytes, view.in_flight)
            step_s = view.cost.seconds(sequences)
            together_s += step_s
            longest_s = max(longest_s, step_s)
            worked += view.in_flight / view.priority * sequences
        return worked / max(together_s / self._snapshot.lanes, longest_s)

    def divide(self, chosen: Engines) -> Sizes:
        """Return the bytes of every engine: what the chosen ones can use, then what the others need, then the rest."""
        sizes = list(self._kept)
        for index, size in zip(chosen, self._fill(chosen), strict=True):
            sizes[index] = size
        remaining = self._snapshot.movable_bytes - sum(sizes)
        if remaining <= 0:
            return sizes
        missing = [max(need - size, 0.0) for need, size in zip(self._needs, sizes, strict=True)]
        more = water_fill(remaining, self._weights, missing)
        spread = max(remaining - sum(more), 0.0) / len(sizes)
        return [size + extra + spread for size, extra in zip(sizes, more, strict=True)]

    def _fill(self, chosen: Engines) -> Sizes:
        """Divide the memory that is free for a set among its engines, max-min fairly."""
        free_bytes = self._free_bytes + sum([self._kept[index] for index in chosen])
        return water_fill(
            free_bytes, [self._weights[index] for index in chosen], [self._needs[index] for index in chosen]
        )
