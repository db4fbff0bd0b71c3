"""The monitor keeps samples at intervals, decisions that changed something, and the engines' states."""

import asyncio
from dataclasses import replace

import pytest

from runtime.api.monitor import Monitor
from runtime.control.costs import StepCost
from runtime.engines.handle import EngineState
from runtime.events import EngineChanged
from tests.runtime.control.builders import record, snapshot, view


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the monitor; a test sets its only element."""
    seconds = [1000.0]
    monkeypatch.setattr("runtime.api.monitor.time.time", lambda: seconds[0])
    return seconds


def test_samples_are_half_a_second_apart(now: list[float]) -> None:
    kept = Monitor(lambda: {"running": 3})
    for _ in range(11):
        kept.record(record())
        now[0] += 0.125
    assert [sample.at for sample in kept.samples] == [1000, 1000.5, 1001]
    assert kept.samples[0].jobs == {"running": 3}
    assert set(kept.samples[0].engines) == {"a", "b"}


def test_only_decisions_with_outcomes_or_a_fault_are_kept(now: list[float]) -> None:
    kept = Monitor(dict)
    kept.record(record())
    kept.record(replace(record(), outcomes={}))
    kept.record(replace(record(), outcomes={}, decision=None, fault="policy mine raised"))
    assert [(decision.number, decision.fault) for decision in kept.decisions] == [(1, None), (2, "policy mine raised")]
    assert kept.decisions[0].engines["b"]["outcome"]["state"] == "rejected"
    assert kept.decisions[1].engines == {}


def test_samples_have_pauses_costs_and_lanes(now: list[float]) -> None:
    seen = snapshot(view("a", paused_s=1.23456, cost=StepCost(0.0121, 0.0002, 0.00003, 0.93456), utilization=0.4))
    kept = Monitor(dict)
    kept.record(replace(record(), snapshot=replace(seen, lanes=1.71828, lanes_confidence=0.8)))
    [sample] = kept.samples
    engine = sample.engines["a"]
    assert (engine.paused_s, engine.utilization) == (1.23, 0.4)
    assert engine.cost == StepCost(0.0121, 0.0002, 0.00003, 0.935)
    assert (sample.devices["0"].lanes, sample.devices["0"].lanes_confidence) == (1.718, 0.8)


async def test_news_ends_when_an_engine_changes_its_state() -> None:
    kept = Monitor(dict)
    waiting = asyncio.create_task(kept.wait_for_change())
    await asyncio.sleep(0)
    kept.on_event(EngineChanged("a", EngineState.READY, 1.0))
    async with asyncio.timeout(60):
        await waiting
    assert kept.states == {"a": EngineState.READY}
