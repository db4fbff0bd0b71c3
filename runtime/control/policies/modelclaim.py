"""`modelclaim`: the rule of AIBrix's ModelClaim controller, which sets memory limits of engines on kvcached.

Source: `computePoolKVTargets` in `pkg/controller/modelclaim/pool_policy.go`, and `observe` in
`pool_policy_controller.go`, at commit e3e10f9 of AIBrix (2026-08-22).
"""

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, bound, decision, fit, unchanged
from runtime.control.snapshot import Snapshot


class ModelClaim(Policy):
    """A policy that gives each engine its base, max(floor, KV cache in use), and active engines the rest by weight.

    An engine is active if it has requests in flight or has just completed some. Its weight is
    1 + min(in flight, cap) + min(completions, cap). An idle engine keeps its base. If no engine is active, nothing
    changes.

    Three things differ from AIBrix:
    - AIBrix counts the completions between two of its decisions, 10 s apart. This policy counts those of the last
      second, rounded, because the controller decides far more often.
    - AIBrix's floor is one percentage of the pool. Here each engine has its own.
    - AIBrix has no ceilings, and makes no plan if the bases exceed the pool. Here sizes are bounded, and are cut if the
      budget has shrunk.
    """

    class Options(Value):
        """Options of `modelclaim`."""

        cap: int = Field(default=4, ge=0, description="Upper limit of each of the two counts in an engine's weight.")

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        cap, views = self.options.cap, snapshot.views
        completions = [round(view.completions_per_s) for view in views]
        weights = [
            1 + min(view.in_flight, cap) + min(completed, cap) if view.in_flight or completed else 0
            for view, completed in zip(views, completions, strict=True)
        ]
        total = sum(weights)
        if not total:
            return unchanged(snapshot, "no engine is active")
        bases = [max(view.limits.kv_floor_bytes, view.kv_used_bytes) for view in views]
        remainder = max(snapshot.movable_bytes - sum(bases), 0)
        wanted = [base + remainder * weight / total for base, weight in zip(bases, weights, strict=True)]

        def reason(index: int) -> str:
            weight = weights[index]
            return f"active with weight {weight} of {total}" if weight else "idle: keeps only what it uses"

        return decision(snapshot, fit(snapshot, bound(snapshot, wanted)), reason)
