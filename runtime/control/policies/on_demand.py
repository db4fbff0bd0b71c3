"""`on_demand`: memory goes to the engine that asks first, as under kvcached without limits."""

from runtime.control.policy import Decision, Policy, bound, decision, fit, mib
from runtime.control.snapshot import Snapshot


class OnDemand(Policy):
    """A policy that lets every engine keep what it uses, and gives the rest to engines in the order of waiting time.

    The engine whose oldest request has waited longest gets what all its requests need, then the next one, until no
    memory is left. Memory that is left after that is spread evenly. There are no options.
    """

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.views
        used = bound(snapshot, [float(view.kv_used_bytes) for view in views])
        remaining = snapshot.movable_bytes - sum(used)
        extra = [0.0] * len(views)
        waited_s = [view.oldest_wait_s for view in views]
        for index in sorted(range(len(views)), key=waited_s.__getitem__, reverse=True):
            if remaining <= 0:
                break
            view = views[index]
            extra[index] = min(max(view.in_flight * view.sequence_bytes - used[index], 0.0), remaining)
            remaining -= extra[index]
        spread = max(remaining, 0.0) / max(len(views), 1)
        wanted = bound(snapshot, [size + more + spread for size, more in zip(used, extra, strict=True)])

        def reason(index: int) -> str:
            view = views[index]
            return f"uses {mib(view.kv_used_bytes)}; {mib(extra[index])} more for {view.waiting} waiting"

        return decision(snapshot, fit(snapshot, wanted), reason)
