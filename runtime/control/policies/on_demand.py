"""`on_demand`: memory to whoever asks first, as under kvcached without limits."""

from runtime.control.policy import Decision, Policy, Sizes, bound, decision, fit, mib
from runtime.control.snapshot import Snapshot


class OnDemand(Policy):
    """An engine keeps what it uses; what nobody uses goes to the engine whose requests have waited longest, as much as
    all its requests need, then to the next. What is left over stays where it was, in equal parts."""

    def decide(self, snapshot: Snapshot) -> Decision:
        views = snapshot.engines
        sizes = bound(snapshot, {name: float(view.kv_used_bytes) for name, view in views.items()})
        left = snapshot.movable_bytes - sum(sizes.values())
        given: Sizes = {}
        for view in sorted(views.values(), key=lambda v: -v.oldest_wait_s):
            more = min(max(view.in_flight * view.sequence_bytes - sizes[view.name], 0.0), max(left, 0.0))
            given[view.name] = more
            left -= more
        spread = max(left, 0.0) / max(len(views), 1)
        wanted = bound(snapshot, {name: size + given[name] + spread for name, size in sizes.items()})

        def word(name: str) -> str:
            view = views[name]
            return f"uses {mib(view.kv_used_bytes)}, gets {mib(given[name])} for {view.waiting} waiting"

        return decision(snapshot, fit(snapshot, wanted), word)
