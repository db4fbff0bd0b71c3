"""Replay counts and describes the decisions in which another policy differs from the log."""

from dataclasses import replace
from typing import Any

import pytest

from runtime.control import catalogue
from runtime.control.contained_policy import ContainedPolicy
from runtime.control.decision_log import Record
from runtime.control.policy import Decision
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
    assert (differences[0].grant.gpu_memory_utilization, replay.pausing) == (0.25, 0)


@pytest.mark.parametrize(
    ("change", "pausing"),
    [({"max_active_seqs": 0}, 1), ({"max_active_seqs": 8}, 0), ({"max_step_tokens": 512}, 0)],
)
async def test_a_difference_of_concurrency_or_step_tokens_alone_counts(change: dict[str, Any], pausing: int) -> None:
    logged = record()
    assert logged.decision is not None
    grants = {**logged.decision.grants, "a": replace(logged.decision.grants["a"], **change)}
    replay = Replay(ContainedPolicy("static", catalogue.make("static")))
    changed = replace(logged, decision=Decision(grants, {"a": "let b run", "b": "its turn"}))
    [difference] = await replay.over([changed, logged])
    assert (difference.record, difference.engine, difference.reason) == (1, "a", "let b run")
    assert difference.other_grant == logged.decision.grants["a"]
    assert difference.grant == grants["a"]
    assert (replay.differing, replay.pausing, replay.largest) == (1, pausing, 0)
