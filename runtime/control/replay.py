"""Another policy over a log of decisions: where it would have decided otherwise on what was seen then.

What it would have led to is not in a log: every snapshot is what came of the policy that ran.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from runtime.control.contained_policy import ContainedPolicy
from runtime.control.decision_log import Record
from runtime.control.policy import Decision


@dataclass(frozen=True)
class Difference:
    """One engine at one record, counted from 1: what it was granted, as a share of the device, and what it would have
    been, each with the reason."""

    record: int
    at_s: float
    engine: str
    share: float
    other_share: float
    reason: str
    other_reason: str


@dataclass
class Replay:
    """Goes over records; counts are of all that were gone over."""

    guard: ContainedPolicy
    least: float = 0.01
    """Differences of less than this part of a grant are none."""
    records: int = 0
    without_a_decision: int = 0
    faults: int = 0
    differing: int = 0
    largest: float = 0.0

    async def over(self, records: Iterable[Record]) -> list[Difference]:
        """Every difference, in the log's order."""
        found: list[Difference] = []
        for record in records:
            self.records += 1
            if record.decision is None:
                self.without_a_decision += 1
                continue
            judged = await self.guard.decide(record.snapshot)
            if judged.decision is None:
                self.faults += 1
                continue
            differences = list(self._differences(record, record.decision, judged.decision))
            self.differing += bool(differences)
            found += differences
        return found

    def _differences(self, record: Record, decided: Decision, other: Decision) -> Iterator[Difference]:
        for name, grant in other.grants.items():
            mine = decided.grants.get(name)
            if mine is None:
                continue
            limits = record.snapshot.engines[name].limits
            before, after = (limits.kv_cache_bytes(g.gpu_memory_utilization) for g in (mine, grant))
            part = abs(after - before) / max(before, 1)
            if part < self.least:
                continue
            self.largest = max(self.largest, part)
            yield Difference(
                self.records,
                record.snapshot.now_s,
                name,
                mine.gpu_memory_utilization,
                grant.gpu_memory_utilization,
                decided.reasons.get(name, ""),
                other.reasons.get(name, ""),
            )
