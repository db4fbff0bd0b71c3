"""The decision log: writing, rotation, reading back, and errors that name the line and key."""

import json
from pathlib import Path

import pytest

from runtime.control import catalogue, decision_log
from runtime.control.decision_log import DecisionLog, Record
from runtime.control.policy import Reasons
from runtime.errors import InputError, TroupeError
from tests.runtime.control.builders import record, snapshot, view


def test_read_returns_the_written_records(tmp_path: Path) -> None:
    records = [record(now_s=0.5), Record("mine", "a burst", snapshot(view("a")), None, fault="it raised")]
    with DecisionLog(tmp_path / "d.jsonl") as log:
        for written in records:
            log.write(written)
    assert list(decision_log.read(log.path)) == records
    assert records[0].outcomes["a"].preempted == 3
    assert records[0].outcomes["b"].reason == "no"


def test_read_accepts_a_log_from_before_costs_and_pauses(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with DecisionLog(path) as log:
        log.write(record())
    line = json.loads(path.read_text())
    for key in ("lanes", "lanes_confidence"):
        del line["snapshot"][key]
    for engine in line["snapshot"]["engines"].values():
        for key in ("paused_s", "stalled_s", "cost", "utilization"):
            del engine[key]
    path.write_text(json.dumps(line) + "\n")
    assert list(decision_log.read(path)) == [record()]


def test_lazy_reasons_are_formatted_when_written(tmp_path: Path) -> None:
    seen = snapshot(view("a", in_flight=60), view("b"))
    decision = catalogue.make("waterfill").decide(seen)
    assert isinstance(decision.reasons, Reasons)
    with DecisionLog(tmp_path / "d.jsonl") as log:
        log.write(Record("waterfill", "tick", seen, decision))
    [logged] = decision_log.read(log.path)
    assert logged.decision is not None
    assert logged.decision.reasons == dict(decision.reasons)
    assert set(logged.decision.reasons) == {"a", "b"}


def test_rotation_keeps_one_older_file(tmp_path: Path) -> None:
    written = record()
    with DecisionLog(tmp_path / "d.jsonl", rotate_bytes=10_000) as log:
        for _ in range(100):
            log.write(written)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["d.jsonl", "d.jsonl.1"]
    assert all(path.stat().st_size < 15_000 for path in tmp_path.iterdir())
    assert list(decision_log.read(log.path))


def test_read_ignores_an_incomplete_last_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with DecisionLog(path) as log:
        log.write(record())
        log.write(record())
    path.write_bytes(path.read_bytes()[:-40])
    assert len(list(decision_log.read(path))) == 1


def test_read_names_the_line_and_key_of_an_invalid_record(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with DecisionLog(path) as log:
        log.write(record())
        log.write(record())
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + second.replace(b'"in_flight":60', b'"in_flight":"many"') + b"\n")
    with pytest.raises(InputError, match=r"d.jsonl, line 2: snapshot.engines.a.in_flight: "):
        list(decision_log.read(path))
    path.write_bytes(b"{}\n")
    with pytest.raises(InputError, match="line 1: policy: "):
        list(decision_log.read(path))


def test_read_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the decision log .*none: No such file"):
        list(decision_log.read(tmp_path / "none"))


def test_open_names_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    message = r"cannot write the decision log .*d\.jsonl: No such file"
    with pytest.raises(TroupeError, match=message), DecisionLog(tmp_path / "no" / "d.jsonl"):
        pass
