"""`static`: fixed shares, equal or as configured."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from agents.role import Value
from runtime.control import pauses
from runtime.control.policy import Decision, Policy, bound, decision, fit
from runtime.control.snapshot import Snapshot


class Static(Policy):
    """A policy that divides the memory that can move once: equally, by weight, or as the engines started.

    With weights or equal parts, sizes change only if the budget or an engine's bounds do. With "configured" they never
    change.
    """

    class Options(Value):
        """Options of `static`."""

        shares: Literal["equal", "configured"] | Mapping[str, float] = Field(
            default="equal",
            description=(
                'How memory is divided: "equal"; "configured", which keeps the share that each engine started with; or'
                " a weight for each engine (1 for an engine that is not named)."
            ),
        )

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        shares = self.options.shares
        if shares == "configured":
            grants = {name: pauses.admitting(view.grant, view.limits) for name, view in snapshot.engines.items()}
            return Decision(grants, dict.fromkeys(grants, "keeps its configured share"))
        given = shares if isinstance(shares, Mapping) else {}
        weights = [max(given.get(view.name, 1.0), 0.0) for view in snapshot.views]
        total = sum(weights) or 1.0
        wanted = [snapshot.movable_bytes * weight / total for weight in weights]
        sizes = fit(snapshot, bound(snapshot, wanted))
        return decision(snapshot, sizes, lambda index: f"fixed at {weights[index] / total:.1%} of the movable memory")
