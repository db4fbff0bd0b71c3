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
        cap = self.options.cap
        weights = {v.name: 1 + min(v.in_flight, cap) + min(v.completions_per_s, cap) for v in snapshot.engines.values()}
        kept = {v.name: float(max(v.limits.kv_floor_bytes, v.kv_used_bytes)) for v in snapshot.engines.values()}
        rest = max(snapshot.movable_bytes - sum(kept.values()), 0.0)
        whole = sum(weights.values())
        wanted = {name: kept[name] + rest * weight / whole for name, weight in weights.items()}
        sizes = fit(snapshot, bound(snapshot, wanted))
        return decision(snapshot, sizes, lambda name: f"weight {weights[name]:.1f} of {whole:.1f}")
