"""The bound of pauses: every engine with requests admits some and finishes some, whatever a policy decides.

A pause ends after MOST_S, and requests of an engine that has finished none for MOST_S are not preempted.
"""

from collections.abc import Mapping
from dataclasses import replace

from runtime.control.snapshot import Snapshot
from runtime.engines.grant import EngineLimits, Grant

MOST_S = 30.0
"""The longest pause of an engine's admission while requests wait, in seconds.

A shorter bound would end turns before the replies in them have finished. Of the engines in configs/simulation, the
slowest takes 25 s for a mean reply (the solver on an L4)."""


def end_overdue(snapshot: Snapshot, grants: Mapping[str, Grant]) -> dict[str, tuple[Grant, str]]:
    """Return the grants of a decision that must change so that no engine starves, changed, each with the reason.

    - An engine that was paused for MOST_S, in which a request has waited for that long, admits requests until it runs
      one. Its KV cache is never below its floor, so it has room for one at least.
    - An engine that has completed no reply for MOST_S may be paused, but its running requests are not preempted.

    After an overdue pause, it therefore completes at least one reply, even if a policy preempts at every tick.
    """
    changed = {}
    for name, view in snapshot.engines.items():
        grant = grants.get(name, view.grant)
        if not is_paused(grant):
            continue
        # After a preemption an engine may report requests as running that wait: then it makes no step.
        if min(view.paused_s, max(view.oldest_wait_s, view.stalled_s)) > MOST_S:
            changed[name] = admitting(grant, view.limits), f"was paused for {view.paused_s:.0f} s: admits requests"
        elif grant.preempt and view.unanswered_s > MOST_S:
            reason = f"no reply was completed for {view.unanswered_s:.0f} s: paused without preempting"
            changed[name] = replace(grant, preempt=False), reason
    return changed


def end_all(snapshot: Snapshot) -> dict[str, Grant]:
    """Return a grant for every engine whose admission is paused, with its memory unchanged and admission open."""
    return {
        name: admitting(view.grant, view.limits) for name, view in snapshot.engines.items() if is_paused(view.grant)
    }


def starves(snapshot: Snapshot, grants: Mapping[str, Grant]) -> bool:
    """Return True if engines have requests in flight and a decision pauses the admission of all of them."""
    busy = [view for view in snapshot.views if view.in_flight]
    return bool(busy) and all(is_paused(grants.get(view.name, view.grant)) for view in busy)


def admitting(grant: Grant, limits: EngineLimits) -> Grant:
    """Return a grant at full concurrency if it pauses admission, otherwise unchanged. Its memory stays the same."""
    return replace(grant, max_active_seqs=limits.seqs_ceiling, preempt=False) if is_paused(grant) else grant


def is_paused(grant: Grant) -> bool:
    """Return True if a grant pauses admission."""
    return grant.max_active_seqs == 0
