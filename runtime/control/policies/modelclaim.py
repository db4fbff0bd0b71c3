"""`modelclaim`: the rule of AIBrix's ModelClaim (its controller on kvcached, read 2026-11)."""

from pydantic import Field

from agents.role import Value
from runtime.control.policy import Decision, Policy, bound, decision, fit
from runtime.control.snapshot import Snapshot


class ModelClaim(Policy):
    """Each engine has max(floor, KV in use); the rest goes by the weights 1 + min(in flight, 4) + min(completions, 4).

    Its authors decide every 10 s, the loop here far more often, so that completions are those of the last second.
    """

    class Options(Value):
        """`cap` of each term of a weight."""

        cap: int = Field(default=4, ge=0)

    options: Options

    def decide(self, snapshot: Snapshot) -> Decision:
        cap, views = self.options.cap, snapshot.views
        weights = [1 + min(view.in_flight, cap) + min(view.completions_per_s, cap) for view in views]
        kept = [max(view.limits.kv_floor_bytes, view.kv_used_bytes) for view in views]
        rest, whole = max(snapshot.movable_bytes - sum(kept), 0.0), sum(weights)
        wanted = [size + rest * weight / whole for size, weight in zip(kept, weights, strict=True)]
        sizes = fit(snapshot, bound(snapshot, wanted))
        return decision(snapshot, sizes, lambda place: f"weight {weights[place]:.1f} of {whole:.1f}")
