"""`on_demand`: memory to whoever asks first, as under kvcached without limits."""

from runtime.control.policy import Decision, Policy, bound, decision, fit, mib
from runtime.control.snapshot import Snapshot


class OnDemand(Policy):
    """An engine keeps what it uses; what nobody uses goes to the engine whose requests have waited longest, as much as
    all its requests need, then to the next. What is left over stays where it was, in equal parts."""

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.views
        sizes = bound(snapshot, [float(view.kv_used_bytes) for view in views])
        left = snapshot.movable_bytes - sum(sizes)
        given = [0.0] * len(views)
        waited = [view.oldest_wait_s for view in views]
        for place in sorted(range(len(views)), key=waited.__getitem__, reverse=True):
            if left <= 0:
                break
            view = views[place]
            given[place] = more = min(max(view.in_flight * view.sequence_bytes - sizes[place], 0.0), left)
            left -= more
        spread = max(left, 0.0) / max(len(views), 1)
        wanted = bound(snapshot, [size + more + spread for size, more in zip(sizes, given, strict=True)])

        def word(place: int) -> str:
            view = views[place]
            return f"uses {mib(view.kv_used_bytes)}, gets {mib(given[place])} for {view.waiting} waiting"

        return decision(snapshot, fit(snapshot, wanted), word)
