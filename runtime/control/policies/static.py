"""`static`: shares that never move, equal or as configured."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, bound, decision, fit
from runtime.control.snapshot import Snapshot


class Static(Policy):
    """Every engine has the same part of the movable memory, or what `shares` say, or what it began with."""

    class Options(Value):
        """`shares`: "equal"; "configured", which leaves every engine at the share that it began with; or a weight for
        each engine (1 for those that are not named)."""

        shares: Literal["equal", "configured"] | Mapping[str, float] = Field(default="equal")

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        if self.options.shares == "configured":
            engines = snapshot.engines
            return Decision({name: view.grant for name, view in engines.items()}, dict.fromkeys(engines, "as it began"))
        given = self.options.shares if isinstance(self.options.shares, Mapping) else {}
        weights = [max(given.get(view.name, 1.0), 0.0) for view in snapshot.views]
        whole = sum(weights) or 1.0
        wanted = [snapshot.movable_bytes * weight / whole for weight in weights]
        sizes = fit(snapshot, bound(snapshot, wanted))
        return decision(snapshot, sizes, lambda place: f"a fixed {weights[place] / whole:.1%}")
