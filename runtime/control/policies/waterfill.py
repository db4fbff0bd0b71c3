"""`waterfill`: max-min fair shares.

An engine needs KV cache for its calls in flight only; more does not speed it up. So the policy divides memory in three
steps:

1. If all needs fit, every engine gets its need. If not, all engines are filled to the same number of sequences (divided
   by priority); an engine that needs fewer leaves the rest to the others.
2. The rest goes to the engines that the forecast expects to be called next, for those calls.
3. What then remains is spread evenly, for the engine that needs it first.

The engine with the longest queue is the bottleneck of a team. This rule fills it last and most, and finds it again at
every decision, so memory follows the work from role to role.

Alternatives that were tried in simulation and were worse: weighting engines by their queues or by the work in them,
because it starves the next engine, where jobs then wait; filling the engine of the oldest calls first, because all
others then idle; and keeping memory for expected calls while it is short. Milder weights (roots of queue lengths, age,
role) make no difference.

Source: max-min fairness, computed by progressive filling.
"""

from collections.abc import Callable

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, Sizes, at_most, bound, damp, decision, fit, mib
from runtime.control.snapshot import Snapshot

MAX_PASSES = 16
"""`water_fill` raises the level from pass to pass and usually finds it in a few. After this many passes the level may
be too low, but never too high."""


class Waterfill(Policy):
    """A policy of max-min fair shares, counted in sequences. No engine gets more than it can use."""

    class Options(Value):
        """Options of `waterfill`."""

        damping: float = Field(
            default=0.05, ge=0, lt=1, description="Changes below this fraction of an engine's KV cache are not made."
        )
        spare: float = Field(
            default=1,
            ge=0,
            allow_inf_nan=False,
            description="Sequences that an engine keeps room for beyond those that it has.",
        )

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        return decision(snapshot, *self.divide(snapshot))

    def divide(self, snapshot: Snapshot) -> tuple[Sizes, Callable[[int], str]]:
        """Return the bytes of every engine, and a function that returns the reason for an engine's index."""
        views = snapshot.views
        weights = [view.sequence_bytes / view.priority for view in views]
        usable = bound(snapshot, self.usable(snapshot))
        filled = water_fill(snapshot.movable_bytes, weights, usable)
        wanted, ahead = filled, [0.0] * len(views)
        remaining = snapshot.movable_bytes - sum(filled)
        if remaining > 0:
            ahead = water_fill(remaining, weights, [view.soon * view.sequence_bytes for view in views])
            spread = max(remaining - sum(ahead), 0.0) / max(len(views), 1)
            wanted = [size + more + spread for size, more in zip(filled, ahead, strict=True)]

        def reason(index: int) -> str:
            view, size, most = views[index], filled[index], usable[index]
            part = f"all {mib(most)}" if size >= most else f"{mib(size)} of the {mib(most)}"
            now = f"{view.in_flight} in flight: {part} it can use"
            return f"{now}; {view.soon:.1f} expected next: {mib(ahead[index])} more"

        sizes = damp(snapshot, bound(snapshot, wanted), self.options.damping)
        return fit(snapshot, sizes), reason

    def usable(self, snapshot: Snapshot) -> Sizes:
        """Return bytes for the recent peak of calls and the spare ones, at most for as many as may run at once."""
        spare = self.options.spare
        sequences = at_most(
            [view.peak_in_flight + spare for view in snapshot.views],
            [view.limits.seqs_ceiling for view in snapshot.views],
        )
        return [count * view.sequence_bytes for count, view in zip(sequences, snapshot.views, strict=True)]


def water_fill(total: float, weights: Sizes, caps: Sizes) -> Sizes:
    """Divide `total` in proportion to weights, and none above its cap; what a cap cuts off goes to the others."""
    if total <= 0:
        return [0.0] * len(caps)
    cap_sum = sum(caps)
    if cap_sum <= total:
        return caps
    remaining, open_cap_sum, level = total, cap_sum, 0.0
    uncapped = list(zip(caps, weights, strict=True))
    for _ in range(MAX_PASSES):
        level = remaining / (sum([weight for _, weight in uncapped]) or 1.0)
        above = [(cap, weight) for cap, weight in uncapped if cap > level * weight]
        if len(above) == len(uncapped):
            break
        above_cap_sum = sum([cap for cap, _ in above])
        remaining -= open_cap_sum - above_cap_sum
        uncapped, open_cap_sum = above, above_cap_sum
    return at_most([level * weight for weight in weights], caps)
