"""Records come back from the log as they went in; a damaged one is refused with line and key; replay finds
differences."""

from pathlib import Path

import pytest

from runtime.control import catalogue, decision_log
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.decision_log import DecisionLog, Outcome, Record
from runtime.control.policy import Decision, Reasons
from runtime.control.replay import Replay
from runtime.engines.grant import Applied, Grant, Rejected
from runtime.errors import InputError, TroupeError
from tests.runtime.control.views import snapshot, view

GRANT = Grant(0.2, 64, 2048)


def record(policy: str = "static", now_s: float = 1.0, busy: int = 60) -> Record:
    seen = snapshot(view("a", 150, in_flight=busy), view("b", 150), now_s=now_s)
    decision = catalogue.make(policy).decide(seen)
    decision = Decision(dict(decision.grants), dict(decision.reasons))
    outcomes = {"a": Outcome.of(Applied(GRANT, 1, 2, 0.5, 0.1, 3)), "b": Outcome.of(Rejected(GRANT, "no"))}
    return Record(policy, "tick", seen, decision, outcomes=outcomes, seconds=0.01)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = [record(now_s=0.5), Record("mine", "a burst", snapshot(view("a")), None, fault="it raised")]
    with DecisionLog(tmp_path / "d.jsonl") as log:
        for one in records:
            log.write(one)
    assert list(decision_log.read(log.path)) == records
    assert records[0].outcomes["a"].preempted == 3
    assert records[0].outcomes["b"].reason == "no"


def test_reasons_are_worded_as_they_are_logged(tmp_path: Path) -> None:
    seen = snapshot(view("a", in_flight=60), view("b"))
    decided = catalogue.make("waterfill").decide(seen)
    assert isinstance(decided.reasons, Reasons)
    with DecisionLog(tmp_path / "d.jsonl") as log:
        log.write(Record("waterfill", "tick", seen, decided))
    [logged] = decision_log.read(log.path)
    assert logged.decision is not None
    assert logged.decision.reasons == dict(decided.reasons)
    assert set(logged.decision.reasons) == {"a", "b"}


def test_it_is_rotated_once(tmp_path: Path) -> None:
    one = record()
    with DecisionLog(tmp_path / "d.jsonl", rotate_bytes=10_000) as log:
        for _ in range(100):
            log.write(one)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["d.jsonl", "d.jsonl.1"]
    assert all(path.stat().st_size < 15_000 for path in tmp_path.iterdir())
    assert list(decision_log.read(log.path))


def test_a_cut_last_line_is_left_out_and_any_other_fault_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with DecisionLog(path) as log:
        log.write(record())
        log.write(record())
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert len(list(decision_log.read(path))) == 1
    lines = whole.splitlines()
    path.write_bytes(lines[0] + b"\n" + lines[1].replace(b'"in_flight":60', b'"in_flight":"many"') + b"\n")
    with pytest.raises(InputError, match=r"d.jsonl, line 2: snapshot.engines.a.in_flight: "):
        list(decision_log.read(path))
    path.write_bytes(b"{}\n")
    with pytest.raises(InputError, match="line 1: policy: "):
        list(decision_log.read(path))
    with pytest.raises(InputError, match="No such file"):
        list(decision_log.read(tmp_path / "none"))


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(TroupeError, match="No such file"), DecisionLog(tmp_path / "no" / "d.jsonl"):
        pass


async def test_the_same_policy_never_differs_and_another_does(tmp_path: Path) -> None:
    records = [record(), record(busy=0), Record("static", "tick", snapshot(view("a")), None, fault="it raised")]
    same = Replay(ContainedPolicy("static", catalogue.make("static")))
    assert await same.over(records) == []
    assert (same.records, same.differing, same.without_a_decision) == (3, 0, 1)
    other = Replay(ContainedPolicy("round_robin", catalogue.make("round_robin")))
    differences = await other.over(records)
    assert [(d.record, d.engine) for d in differences] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert other.differing == 2
    assert other.largest == pytest.approx(0.93, abs=0.01)
    assert differences[0].other_reason == "the turn is b's"
