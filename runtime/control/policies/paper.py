"""`paper`: Algorithm 1 of arXiv 2512.22149."""

from collections.abc import Sequence

from runtime.control.policy import Decision, Policy, bound, decision, fit
from runtime.control.snapshot import Snapshot


def algorithm_1(
    arrivals_per_s: Sequence[float], minimum: Sequence[float], priority: Sequence[int], capacity: float = 1.0
) -> list[float]:
    """Return each agent's share g_i of `capacity`.

    Agent i has arrival rate lambda_i, minimum share R_i and priority P_i (1 is the highest). Its demand is
    d_i = lambda_i R_i / P_i, and g_i = max(R_i, d_i / sum(d) capacity). All g_i are 0 if sum(d) is 0. Shares that add
    up to more than `capacity` are scaled down to it.
    """
    demands = [rate * least / rank for rate, least, rank in zip(arrivals_per_s, minimum, priority, strict=True)]
    total_demand = sum(demands)
    if not total_demand:
        return [0.0] * len(demands)
    shares = [max(least, demand / total_demand * capacity) for least, demand in zip(minimum, demands, strict=True)]
    total = sum(shares)
    return [share / total * capacity for share in shares] if total > capacity else shares


class Paper(Policy):
    """Algorithm 1 over the memory that can move, which is the paper's capacity of 1.

    Memory of an engine besides its KV cache cannot move, and every engine keeps its floor. Apart from that, the
    algorithm is the paper's to the letter. An engine whose roles declare no `minimum_share` has an equal one. There are
    no options.
    """

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.views
        equal = 1 / max(len(views), 1)
        minimum = [equal if view.minimum_share is None else view.minimum_share for view in views]
        shares = algorithm_1([view.arrivals_per_s for view in views], minimum, [view.priority for view in views])
        sizes = fit(snapshot, bound(snapshot, [share * snapshot.movable_bytes for share in shares]))

        def reason(index: int) -> str:
            view = views[index]
            inputs = f"{view.arrivals_per_s:.1f} requests/s, R={minimum[index]:.2f}, P={view.priority}"
            return f"{inputs}: g={shares[index]:.3f}"

        return decision(snapshot, sizes, reason)
