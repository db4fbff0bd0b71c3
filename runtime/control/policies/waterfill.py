"""`waterfill`, the default: max-min fair. Nobody gets more than it can use, and what is short is shared equally.

Memory beyond the sequences that an engine has buys nothing; so each can use as much as its calls in flight need. Where
that is more than there is, all engines are filled to the same number of sequences, and those that need fewer leave the
rest to the others. What is left then goes ahead of the work: to where the calls will come that follow on what runs now.
What nobody expects to use is spread evenly, for whoever needs it first.

The bottleneck of a team is the engine with the longest queue, so it is the one that is filled last and most, and is
found again at every decision: while work passes from role to role, memory goes with it. Tried in simulation and worse:
weighing engines by what is queued or by the work in it, which starves the next engine, behind which jobs then wait; and
keeping memory for expected calls where it is short.
"""

from collections.abc import Mapping

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, Sizes, bound, damp, decision, fit, mib
from runtime.control.snapshot import Snapshot

PASSES = 16
"""The level is found in a few passes over the engines; after so many the rest is cut in proportion."""


class Waterfill(Policy):
    """Max-min fair shares, in sequences, of what each engine can use."""

    class Options(Value):
        """`damping`: a change of less than this part of what an engine has is not made. `spare`: sequences that an
        engine keeps room for beyond those it has."""

        damping: float = Field(default=0.05, ge=0, lt=1)
        spare: float = Field(default=1, ge=0, allow_inf_nan=False)

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.engines
        weights = {name: view.sequence_bytes / view.priority for name, view in views.items()}
        present = bound(snapshot, self._need(snapshot))
        filled = water_fill(snapshot.movable_bytes, weights, present)
        left = max(snapshot.movable_bytes - sum(filled.values()), 0.0)
        expected = {name: view.soon * view.sequence_bytes for name, view in views.items()}
        ahead = water_fill(left, weights, expected) if left else dict.fromkeys(views, 0.0)
        spread = max(left - sum(ahead.values()), 0.0) / max(len(views), 1)
        wanted = bound(snapshot, {name: size + ahead[name] + spread for name, size in filled.items()})

        def word(name: str) -> str:
            view, part, most = views[name], filled[name], present[name]
            got = f"all that it can use, {mib(most)}" if part >= most else f"{mib(part)} of the {mib(most)} it can use"
            return f"{view.in_flight} in flight: {got}; {view.soon:.1f} expected: {mib(ahead[name])}"

        return decision(snapshot, fit(snapshot, damp(snapshot, wanted, self.options.damping)), word)

    def _need(self, snapshot: Snapshot) -> Sizes:
        """Bytes for every sequence that an engine has, and one to spare, as far as it may run them at once."""
        spare, sizes = self.options.spare, {}
        for name, view in snapshot.engines.items():
            sequences, most = view.in_flight + spare, view.limits.seqs_ceiling
            sizes[name] = (sequences if sequences < most else most) * view.sequence_bytes
        return sizes


def water_fill(whole: float, weights: Mapping[str, float], caps: Sizes) -> Sizes:
    """Divide `whole` in proportion to weights, nobody above its cap; what a cap leaves goes to the others."""
    filled: Sizes = {}
    left, still_open = float(whole), dict(weights)
    for _ in range(PASSES):
        level = left / (sum(still_open.values()) or 1.0)
        full = {name: caps[name] for name, weight in still_open.items() if caps[name] <= level * weight}
        if not full:
            break
        filled |= full
        left -= sum(full.values())
        still_open = {name: weight for name, weight in still_open.items() if name not in full}
    level = left / (sum(still_open.values()) or 1.0)
    return filled | {name: min(level * weight, caps[name]) for name, weight in still_open.items()}
