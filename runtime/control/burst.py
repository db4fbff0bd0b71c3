"""Detects bursts: engines that newly have more calls in flight than they may run. Pure: no clock, no I/O."""

from collections.abc import Mapping

from runtime.control.snapshot import Snapshot
from runtime.engines.grant import Grant


class BurstDetector:
    """A detector that compares the calls in flight with those that the last decision took into account.

    An engine is short if it has more calls than its KV cache and its concurrency allow. It is newly short if it was not
    short at the last decision, or if it has more calls now than it had then.
    """

    def __init__(self) -> None:
        self.any_short = False
        """True if an engine with a grant was short at the last decision."""
        self._expected: Mapping[str, int] = {}

    def note_decision(self, in_flight: Mapping[str, int], capacity: Mapping[str, int]) -> None:
        """Record, by engine, the calls that a decision took into account and the calls that its grants allow.

        An engine without a grant, because it restarts or sleeps, has no capacity. No decision can give it one.
        """
        self.any_short = any(in_flight[engine] > allowed for engine, allowed in capacity.items())
        self._expected = {engine: max(calls, capacity.get(engine, 0)) for engine, calls in in_flight.items()}

    def newly_short(self, in_flight: Mapping[str, int]) -> list[str]:
        """Return the engines that are newly short with these calls. An engine without a grant may run none."""
        return [engine for engine, calls in in_flight.items() if calls > self._expected.get(engine, 0)]


def capacity(snapshot: Snapshot, grants: Mapping[str, Grant]) -> dict[str, int]:
    """Return how many average sequences each engine may run with its grant, new or present.

    The size of its KV cache and its concurrency limit it: a call to an engine whose admission is paused is a burst.
    """
    capacities = {}
    for name, view in snapshot.engines.items():
        grant = grants.get(name, view.grant)
        kv_cache_bytes = view.limits.kv_cache_bytes(grant.gpu_memory_utilization)
        capacities[name] = min(int(kv_cache_bytes / max(view.sequence_bytes, 1)), grant.max_active_seqs)
    return capacities
