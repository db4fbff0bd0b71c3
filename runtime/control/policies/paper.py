"""`paper`: Algorithm 1 of arXiv 2512.22149."""

from collections.abc import Sequence

from runtime.control.policy import Decision, Policy, bound, decision, fit
from runtime.control.snapshot import Snapshot


def algorithm_1(
    arrivals_per_s: Sequence[float], minimum: Sequence[float], priority: Sequence[int], capacity: float = 1.0
) -> list[float]:
    """Shares g_i of `capacity` for agents i with arrival rates lambda_i, minimum shares R_i and priorities P_i (1
    high).

    d_i = lambda_i R_i / P_i; g_i = max(R_i, d_i / sum(d) capacity), all 0 where sum(d) is; scaled down where they come
    to more than `capacity`.
    """
    demands = [rate * least / rank for rate, least, rank in zip(arrivals_per_s, minimum, priority, strict=True)]
    whole = sum(demands)
    if not whole:
        return [0.0] * len(demands)
    shares = [max(least, demand / whole * capacity) for least, demand in zip(minimum, demands, strict=True)]
    total = sum(shares)
    return [share / total * capacity for share in shares] if total > capacity else shares


class Paper(Policy):
    """Algorithm 1 over the memory that can move: the paper's capacity of 1 is all of it.

    What an engine holds besides its KV cache cannot move, and its floor is kept; with those apart, it is to the letter.
    A role that declares no minimum has an equal part.
    """

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.views
        equal = 1 / max(len(views), 1)
        minimum = [equal if view.minimum_share is None else view.minimum_share for view in views]
        shares = algorithm_1([v.arrivals_per_s for v in views], minimum, [v.priority for v in views])
        sizes = fit(snapshot, bound(snapshot, [share * snapshot.movable_bytes for share in shares]))

        def word(place: int) -> str:
            view = views[place]
            rule = f"R {minimum[place]:.2f}, P {view.priority}: g = {shares[place]:.3f}"
            return f"{view.arrivals_per_s:.1f} requests/s, {rule}"

        return decision(snapshot, sizes, word)
