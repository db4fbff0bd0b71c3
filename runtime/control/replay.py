"""Runs another policy over a decision log and finds where it would have decided differently on the same snapshots.

It cannot say what that would have led to: every snapshot in a log is a consequence of the policy that ran.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from runtime.control.contained_policy import ContainedPolicy
from runtime.control.decision_log import Record
from runtime.control.pauses import is_paused
from runtime.control.policy import Decision
from runtime.engines.grant import Grant


@dataclass(frozen=True)
class Difference:
    """One engine to which the other policy would have given another grant, with both reasons.

    `record` is the number of the record in the log, counted from 1.
    """

    record: int
    at_s: float
    engine: str
    grant: Grant
    other_grant: Grant
    reason: str
    other_reason: str

    @property
    def pauses(self) -> bool:
        """True if only one of the policies pauses the engine's admission."""
        return is_paused(self.grant) != is_paused(self.other_grant)


@dataclass
class Replay:
    """A run of a policy over records, with the counts of all records so far.

    `least` is the fraction of an engine's KV cache below which a difference of memory is ignored; `largest` is the
    largest fraction seen. Any difference of concurrency or of tokens per step counts. `pausing` counts the records in
    which only one of the policies pauses an engine's admission.
    """

    policy: ContainedPolicy
    least: float = 0.01
    records: int = 0
    without_a_decision: int = 0
    faults: int = 0
    differing: int = 0
    pausing: int = 0
    largest: float = 0.0

    async def over(self, records: Iterable[Record]) -> list[Difference]:
        """Return every difference, in the order of the log."""
        found: list[Difference] = []
        for record in records:
            self.records += 1
            if record.decision is None:
                self.without_a_decision += 1
                continue
            answer = await self.policy.decide(record.snapshot)
            if answer.decision is None:
                self.faults += 1
                continue
            differences = list(self._differences(record, record.decision, answer.decision))
            self.differing += bool(differences)
            self.pausing += any(difference.pauses for difference in differences)
            found += differences
        return found

    def _differences(self, record: Record, logged: Decision, other: Decision) -> Iterator[Difference]:
        for name, grant in other.grants.items():
            logged_grant = logged.grants.get(name)
            if logged_grant is None:
                continue
            limits = record.snapshot.engines[name].limits
            logged_bytes = limits.kv_cache_bytes(logged_grant.gpu_memory_utilization)
            other_bytes = limits.kv_cache_bytes(grant.gpu_memory_utilization)
            fraction = abs(other_bytes - logged_bytes) / max(logged_bytes, 1)
            same_share = replace(grant, gpu_memory_utilization=logged_grant.gpu_memory_utilization)
            if fraction < self.least and same_share == logged_grant:
                continue
            self.largest = max(self.largest, fraction)
            yield Difference(
                self.records,
                record.snapshot.now_s,
                name,
                logged_grant,
                grant,
                logged.reasons.get(name, ""),
                other.reasons.get(name, ""),
            )
