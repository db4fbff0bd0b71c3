"""`modelclaim`: the rule of AIBrix's ModelClaim controller, which sets the limits of engines on kvcached.

Source: `computePoolKVTargets` in `pkg/controller/modelclaim/pool_policy.go`, and `observe` in
`pool_policy_controller.go`, at commit e3e10f9 of AIBrix (2026-08-22).
"""

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, bound, decision, fit, unchanged
from runtime.control.snapshot import Snapshot


class ModelClaim(Policy):
    """Each engine has its base, max(floor, KV cache in use); active engines share the remainder by weight.

    An engine is active if it has requests in flight or has just completed some. Its weight is
    1 + min(in flight, 4) + min(completions, 4). An idle engine keeps its base. If no engine is active, nothing changes.

    Three things differ. AIBrix counts the completions between two of its decisions, 10 s apart; here they are those of
    the last second, rounded, because the controller decides far more often. AIBrix's floor is one percentage of the
    pool; here it is each engine's own. AIBrix has no ceilings and makes no plan if the bases exceed the pool; here
    sizes are bounded, and cut to a budget that has shrunk.
    """

    class Options(Value):
        """`cap` of each term of a weight."""

        cap: int = Field(default=4, ge=0)

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        cap, views = self.options.cap, snapshot.views
        completions = [round(view.completions_per_s) for view in views]
        weights = [
            1 + min(view.in_flight, cap) + min(done, cap) if view.in_flight or done else 0
            for view, done in zip(views, completions, strict=True)
        ]
        whole = sum(weights)
        if not whole:
            return unchanged(snapshot, "no engine is active")
        bases = [max(view.limits.kv_floor_bytes, view.kv_used_bytes) for view in views]
        remainder = max(snapshot.movable_bytes - sum(bases), 0)
        wanted = [base + remainder * weight / whole for base, weight in zip(bases, weights, strict=True)]
        sizes = fit(snapshot, bound(snapshot, wanted))
        return decision(
            snapshot, sizes, lambda place: f"weight {weights[place]} of {whole}" if weights[place] else "idle"
        )
