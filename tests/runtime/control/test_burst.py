"""The burst detector reports engines that newly have more calls than their KV cache can hold."""

from dataclasses import replace

from runtime.control.burst import BurstDetector, capacity
from runtime.engines.grant import Grant
from tests.runtime.control.builders import LIMITS, snapshot, view


def test_more_calls_than_fit_are_a_burst() -> None:
    bursts = BurstDetector()
    bursts.note_decision({"a": 2, "b": 0}, {"a": 10, "b": 10})
    assert bursts.newly_short({"a": 10, "b": 10}) == []
    assert bursts.newly_short({"a": 11, "b": 10}) == ["a"]
    assert bursts.newly_short({"a": 11, "b": 12}) == ["a", "b"]


def test_an_engine_that_was_already_short_needs_more_calls_to_be_newly_short() -> None:
    bursts = BurstDetector()
    bursts.note_decision({"a": 50}, {"a": 10})
    assert bursts.newly_short({"a": 50}) == []
    assert bursts.newly_short({"a": 51}) == ["a"]


def test_an_engine_without_a_grant_is_short_with_its_first_call() -> None:
    bursts = BurstDetector()
    assert bursts.newly_short({"a": 0}) == []
    assert bursts.newly_short({"a": 1}) == ["a"]


def test_calls_that_wait_for_an_engine_without_a_grant_are_a_burst_once() -> None:
    bursts = BurstDetector()
    bursts.note_decision({"a": 5, "b": 0}, {"b": 10})
    assert bursts.newly_short({"a": 5, "b": 0}) == []
    assert bursts.newly_short({"a": 6, "b": 0}) == ["a"]
    assert not bursts.any_short


def test_only_the_latest_decision_counts() -> None:
    bursts = BurstDetector()
    bursts.note_decision({"a": 0}, {"a": 100})
    bursts.note_decision({"a": 0}, {"a": 10})
    assert bursts.newly_short({"a": 20}) == ["a"]


def test_any_short_says_whether_calls_exceeded_a_capacity() -> None:
    bursts = BurstDetector()
    assert not bursts.any_short
    bursts.note_decision({"a": 11, "b": 0}, {"a": 10, "b": 10})
    assert bursts.any_short
    bursts.note_decision({"a": 10, "b": 0}, {"a": 10, "b": 10})
    assert not bursts.any_short


def test_capacity_is_limited_by_memory_and_by_concurrency() -> None:
    seen = snapshot(view("a", 100), view("b", 50.5), view("c", 30, sequence_bytes=0))  # 1 MiB a sequence
    assert capacity(seen, {}) == {"a": 64, "b": 50, "c": 64}
    grants = {
        "a": Grant(LIMITS.share(20 << 20), 64, 2048),
        "b": replace(seen.engines["b"].grant, max_active_seqs=0),
        "c": replace(seen.engines["c"].grant, max_active_seqs=5),
    }
    assert capacity(seen, grants) == {"a": 20, "b": 0, "c": 5}
