"""Replay counts and describes the decisions in which another policy differs from the log."""

import pytest

from runtime.control import catalogue
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.decision_log import Record
from runtime.control.replay import Replay
from tests.runtime.control.builders import record, snapshot, view

RECORDS = [record(), record(in_flight=0), Record("static", "tick", snapshot(view("a")), None, fault="it raised")]


async def test_the_same_policy_does_not_differ() -> None:
    replay = Replay(ContainedPolicy("static", catalogue.make("static")))
    assert await replay.over(RECORDS) == []
    assert (replay.records, replay.differing, replay.without_a_decision) == (3, 0, 1)


async def test_differences_of_another_policy_are_returned_with_its_reasons() -> None:
    replay = Replay(ContainedPolicy("round_robin", catalogue.make("round_robin")))
    differences = await replay.over(RECORDS)
    assert [(d.record, d.engine) for d in differences] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert replay.differing == 2
    assert replay.largest == pytest.approx(0.93, abs=0.01)
    assert differences[0].other_reason == "b's turn"
