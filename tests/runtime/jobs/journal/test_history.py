"""The time that a job was worked, from its events."""

from runtime.jobs.journal.history import worked_s
from runtime.jobs.journal.records import INTERRUPTED, JobEvent


def event(at: float, kind: str, why: str | None = None) -> JobEvent:
    return JobEvent(0, "a", at, kind, {} if why is None else {"why": why})


def test_interrupted_run_counts_until_its_last_reply() -> None:
    assert worked_s([event(1, "queued")]) == 0
    waited = [event(1, "queued"), event(5, "running")]
    retried = [*waited, event(6, "replied"), event(9, "queued", "the engine failed"), event(20, "running")]
    assert worked_s(retried) == 4
    interrupted = [*retried, event(23, "replied"), event(1000, "queued", INTERRUPTED), event(1001, "running")]
    assert worked_s(interrupted) == 4 + 3
