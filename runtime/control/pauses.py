"""The bound of pauses: no engine waits longer than MOST_S to admit requests, whatever a policy decides or fails to."""

from collections.abc import Mapping
from dataclasses import replace

from runtime.control.snapshot import Snapshot
from runtime.engines.grant import EngineLimits, Grant

MOST_S = 30.0
"""The longest pause of an engine's admission while requests wait, in seconds.

A shorter bound would end turns before the replies in them have finished. Of the engines in configs/simulation, the
slowest takes 25 s for a mean reply (the solver on an L4)."""


def end_overdue(snapshot: Snapshot, grants: Mapping[str, Grant]) -> dict[str, Grant]:
    """Return the grants of a decision, changed so that no engine stays paused longer than MOST_S.

    An overdue engine, in which a request has waited for that long, admits requests until the next decision. Its KV
    cache is never below its floor, so it has room for one at least, unless requests that it admitted before still run.
    """
    admitted = {
        name: admitting(grants.get(name, view.grant), view.limits)
        for name, view in snapshot.engines.items()
        # After a preemption an engine may report requests as running that wait: then it makes no step.
        if min(view.paused_s, max(view.oldest_wait_s, view.stalled_s)) > MOST_S
        and is_paused(grants.get(name, view.grant))
    }
    return {**grants, **admitted}


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
