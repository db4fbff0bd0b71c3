"""`waterfill`, the default: max-min fair. Nobody gets more than it can use, and what is short is shared equally.

Memory beyond the sequences that an engine has buys nothing; so each can use as much as its calls in flight need. Where
that is more than there is, all engines are filled to the same number of sequences, and those that need fewer leave the
rest to the others. What is left then goes ahead of the work: to where the calls will come that follow on what runs now.
What nobody expects to use is spread evenly, for whoever needs it first.

The bottleneck of a team is the engine with the longest queue, so it is the one that is filled last and most, and is
found again at every decision: while work passes from role to role, memory goes with it. Tried in simulation and worse:
weighing engines by what is queued or by the work in it, which starves the next engine, behind which jobs then wait;
filling the engine of the oldest calls first, which leaves all but one idle; and keeping memory for expected calls where
it is short. Weighing them more mildly, by roots of their queues, by age or by role, makes no difference.
"""

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, Sizes, bound, damp, decision, fit, mib
from runtime.control.snapshot import Snapshot

PASSES = 16
"""The level rises from pass to pass, and is found in a few; after so many it is short of the highest, never above
it."""


class Waterfill(Policy):
    """Max-min fair shares, in sequences, of what each engine can use."""

    class Options(Value):
        """`damping`: a change of less than this part of what an engine has is not made. `spare`: sequences that an
        engine keeps room for beyond those it has."""

        damping: float = Field(default=0.05, ge=0, lt=1)
        spare: float = Field(default=1, ge=0, allow_inf_nan=False)

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.views
        weights = [view.sequence_bytes / view.priority for view in views]
        present = bound(snapshot, self._need(snapshot))
        filled = water_fill(snapshot.movable_bytes, weights, present)
        wanted, ahead = filled, [0.0] * len(views)
        if (left := snapshot.movable_bytes - sum(filled)) > 0:
            ahead = water_fill(left, weights, [view.soon * view.sequence_bytes for view in views])
            spread = max(left - sum(ahead), 0.0) / max(len(views), 1)
            wanted = [size + more + spread for size, more in zip(filled, ahead, strict=True)]

        def word(place: int) -> str:
            view, part, most = views[place], filled[place], present[place]
            got = f"all that it can use, {mib(most)}" if part >= most else f"{mib(part)} of the {mib(most)} it can use"
            return f"{view.in_flight} in flight: {got}; {view.soon:.1f} expected: {mib(ahead[place])}"

        wanted = damp(snapshot, bound(snapshot, wanted), self.options.damping)
        return decision(snapshot, fit(snapshot, wanted), word)

    def _need(self, snapshot: Snapshot) -> Sizes:
        """Bytes for every sequence that an engine has, and one to spare, as far as it may run them at once."""
        spare = self.options.spare
        return [
            (most if (n := view.peak_in_flight + spare) > (most := view.limits.seqs_ceiling) else n)
            * view.sequence_bytes
            for view in snapshot.views
        ]


def water_fill(whole: float, weights: Sizes, caps: Sizes) -> Sizes:
    """Divide `whole` in proportion to weights, nobody above its cap; what a cap leaves goes to the others."""
    if whole <= 0:
        return [0.0] * len(caps)
    if (capped := sum(caps)) <= whole:
        return caps
    left, still_open, level = whole, list(zip(caps, weights, strict=True)), 0.0
    for _ in range(PASSES):
        level = left / (sum([weight for _, weight in still_open]) or 1.0)
        above = [engine for engine in still_open if engine[0] > level * engine[1]]
        if len(above) == len(still_open):
            break
        still_open, before, capped = above, capped, sum([cap for cap, _ in above])
        left -= before - capped
    return [cap if cap <= (part := level * weight) else part for cap, weight in zip(caps, weights, strict=True)]
