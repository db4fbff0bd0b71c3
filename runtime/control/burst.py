"""Detects bursts: engines that newly have more calls in flight than their KV cache can hold. Pure: no clock, no I/O."""

from collections.abc import Mapping

from runtime.control.snapshot import Snapshot
from runtime.engines.grant import Grant


class BurstDetector:
    """A detector that compares the calls in flight with those that the last decision took into account.

    An engine is short if it has more calls than its KV cache can hold. It is newly short if it was not short at the
    last decision, or if it has more calls now than it had then.
    """

    def __init__(self) -> None:
        self.any_short = False
        """Whether an engine was short at the last decision."""
        self._expected: Mapping[str, int] = {}

    def note_decision(self, in_flight: Mapping[str, int], capacity: Mapping[str, int]) -> None:
        """Record, by engine, the calls that a decision took into account and the calls that its grants can hold."""
        self.any_short = any(calls > capacity[engine] for engine, calls in in_flight.items())
        self._expected = {engine: max(calls, capacity[engine]) for engine, calls in in_flight.items()}

    def newly_short(self, in_flight: Mapping[str, int]) -> list[str]:
        """Return the engines that are newly short with these calls. An engine without a grant can hold none."""
        return [engine for engine, calls in in_flight.items() if calls > self._expected.get(engine, 0)]


def capacity(snapshot: Snapshot, grants: Mapping[str, Grant]) -> dict[str, int]:
    """Return the number of average sequences that each engine's KV cache holds with its grant, new or present."""
    kv_bytes = {name: view.kv_cache_bytes for name, view in snapshot.engines.items()}
    for name, grant in grants.items():
        kv_bytes[name] = snapshot.engines[name].limits.kv_cache_bytes(grant.gpu_memory_utilization)
    return {name: int(kv_bytes[name] / max(view.sequence_bytes, 1)) for name, view in snapshot.engines.items()}
