"""Costs are learnt from the work of engines on a device with known costs and lanes, and bad reports are refused."""

import logging
import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest

from runtime.control.costs import ENOUGH, PRIOR, PRIOR_LANES, STALE_S, Costs, StepCost, Utilization
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState, EngineStats, Work

TRUE = {
    "planner": StepCost(0.0025, 0.00002, 0.000005),
    "solver": StepCost(0.020, 0.0002, 0.00003),
    "critic": StepCost(0.004, 0.00003, 0.00001),
}
LOOK_S = 0.05
IDLE = {"a": 0}
"""Calls in flight that an engine's own figures do not show yet."""


def stats(work: Work, running: int = 0) -> EngineStats:
    return EngineStats(EngineState.READY, None, 0, running, 0, 0.0, 0, 0, 0, 0, work)


@dataclass
class _Step:
    left_s: float
    sequences: int
    prompt_tokens: int
    began_s: float


class Device:
    """Engines with the TRUE costs, times `slower`, on a number of lanes, and the costs learnt from them."""

    def __init__(self, lanes: float, utilization: bool = False, slower: float = 1) -> None:
        self._slower = slower
        self.costs = Costs()
        self._lanes = lanes
        self._reports_utilization = utilization
        self._work = dict.fromkeys(TRUE, Work())
        self._steps: dict[str, _Step] = {}
        self._rng = random.Random(7)
        self._now_s = 0.0
        self._look(None)

    def run(self, seconds: float, active: Callable[[float], Collection[str]]) -> Costs:
        """Run the engines that `active` names at each moment, and look every LOOK_S seconds."""
        slice_s, busy_s, next_look_s = 0.0005, 0.0, self._now_s + LOOK_S
        end_s = self._now_s + seconds
        while self._now_s < end_s:
            self._now_s += slice_s
            for name in active(self._now_s):
                self._steps.setdefault(name, self._step(name))
            busy_s += slice_s * min(len(self._steps) / self._lanes, 1.0)
            done_s = slice_s / max(len(self._steps) / self._lanes, 1.0)
            for name, step in list(self._steps.items()):
                step.left_s -= done_s
                if step.left_s <= 0:
                    took_s = self._now_s - step.began_s
                    self._work[name] = self._work[name].plus(took_s, step.sequences, step.prompt_tokens)
                    del self._steps[name]
            if self._now_s >= next_look_s:
                self._look(busy_s / LOOK_S)
                busy_s, next_look_s = 0.0, next_look_s + LOOK_S
        return self.costs

    def _step(self, name: str) -> _Step:
        sequences, prompt_tokens = self._rng.randint(1, 30), self._rng.choice([0, 0, 0, 500])
        seconds = self._slower * TRUE[name].seconds(sequences, prompt_tokens) * self._rng.gauss(1, 0.05)
        return _Step(seconds, sequences, prompt_tokens, self._now_s)

    def _look(self, utilization: float | None) -> None:
        running = {name: stats(work, int(name in self._steps)) for name, work in self._work.items()}
        calls = {name: int(name in self._steps) for name in TRUE}
        reported = None if utilization is None or not self._reports_utilization else Utilization(utilization)
        self.costs.look(self._now_s, running, calls, reported)


def alone_and_together(now_s: float) -> Collection[str]:
    return list(TRUE) if int(now_s) % 2 else [list(TRUE)[int(now_s / 2) % 3]]


@pytest.mark.parametrize("slower", [1, 4])
@pytest.mark.parametrize("lanes", [1, 1.7, 3])
def test_costs_and_lanes_are_learnt_from_engines_that_compute_alone_and_together(lanes: float, slower: float) -> None:
    """With `slower` 4, a step takes up to 166 ms, which is longer than the time between two looks."""
    costs = Device(lanes, slower=slower).run(20, alone_and_together)
    for name, true in TRUE.items():
        cost = costs.cost(name)
        assert cost.confidence > 0.7
        for sequences, prompt_tokens in ((1, 0), (30, 0), (15, 500)):
            expected_s = slower * true.seconds(sequences, prompt_tokens)
            assert cost.seconds(sequences, prompt_tokens) == pytest.approx(expected_s, rel=0.15)
    assert costs.lanes == pytest.approx(lanes, rel=0.15)
    assert costs.confidence > 0.8


def test_engines_that_always_compute_together_are_assumed_to_take_turns() -> None:
    costs = Device(1).run(5, lambda now_s: list(TRUE))
    for name, true in TRUE.items():
        assert costs.cost(name).seconds(20) == pytest.approx(true.seconds(20), rel=0.15)
        assert costs.cost(name).confidence < ENOUGH
    assert (costs.lanes, costs.confidence) == (PRIOR_LANES, 0)


def test_low_utilization_shows_lanes_of_a_device_that_engines_only_use_alone() -> None:
    """An engine keeps a device of 2.5 lanes busy for 40% of the time, by itself."""

    def alone(now_s: float) -> Collection[str]:
        return [list(TRUE)[int(now_s) % 3]]

    assert Device(2.5).run(12, alone).lanes < 1.3
    assert Device(2.5, utilization=True).run(12, alone).lanes == pytest.approx(2.5, rel=0.2)


class Pair:
    """Two engines whose steps of 80 ms are longer than the time between two looks, and what is learnt from them."""

    def __init__(self) -> None:
        self.costs = Costs()
        self._work = {"a": Work(), "b": Work()}
        self._now_s = 0.0

    def look(self, looks: int, utilization: Utilization | None, active: str, step_s: float = 0.08) -> None:
        """Look every 50 ms. The `active` engines end a step at every other look, never both at once."""
        for number in range(looks):
            self._now_s += 0.05
            name = "ab"[number % 2]
            if name in active:
                self._work[name] = self._work[name].plus(step_s, 4, 0)
            running = {name: stats(work, 4 * (name in active)) for name, work in self._work.items()}
            self.costs.look(self._now_s, running, dict.fromkeys("ab", 0), utilization)


def test_a_saturated_device_has_no_more_lanes_than_its_engines_use() -> None:
    """Alone, an engine works 80% of the time. A GPU that is busy for 40% of it has 2 lanes."""
    pair = Pair()
    for active in "abab":
        pair.look(100, Utilization(0.4), active)
    assert pair.costs.lanes == pytest.approx(2, rel=0.1)
    pair.look(800, Utilization(1.0), "ab", step_s=0.1)  # 1.6 steps of 80 ms in 100 ms
    assert pair.costs.lanes == pytest.approx(1.6, rel=0.1)


def test_utilization_is_no_evidence_while_no_engine_computes() -> None:
    pair = Pair()
    for active in "abab":
        pair.look(100, Utilization(0.4), active)
    lanes = pair.costs.lanes
    pair.look(2000, Utilization(0.5), "")
    assert pair.costs.lanes == lanes


@pytest.mark.parametrize(
    "shared", [Utilization(0.8, own=0.4), Utilization(1.0, own=0.4), Utilization(1.0, own=0.95)], ids=str
)
def test_only_the_engines_own_use_of_a_device_is_evidence(shared: Utilization) -> None:
    """The engines' own use of 0.4 shows 2 lanes; a device without room shows nothing about engines that run alone."""
    pair = Pair()
    for active in "abab":
        pair.look(100, shared, active)
    assert pair.costs.lanes == pytest.approx(2 if shared.device < 1 else PRIOR_LANES, rel=0.1)


def test_a_fit_follows_an_engine_that_becomes_slower() -> None:
    costs, work, now_s = Costs(), Work(), 0.0
    for step_s in (0.01, 0.03):
        for _ in range(1200):
            work, now_s = work.plus(step_s, 4, 0), now_s + 0.1
            costs.look(now_s, {"a": stats(work, 4)}, IDLE)
        assert costs.cost("a").seconds(4) == pytest.approx(step_s, rel=0.2)


def test_a_stall_is_not_the_cost_of_a_step() -> None:
    costs, work, now_s = Costs(), Work(), 0.0
    for number in range(50):
        work, now_s = work.plus(5.0 if number == 40 else 0.01, 4, 0), now_s + 6
        costs.look(now_s, {"a": stats(work, 4)}, IDLE)
    assert costs.cost("a").seconds(4) == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize(
    "bad",
    [
        {"busy_s": math.nan},
        {"busy_s": 0.02},  # as before: the steps took no time
        {"busy_s": -1.0},
        {"busy_s": 1e9},
        {"busy_s": 0.02 + 2e-9},  # two steps of a nanosecond
        {"sequences": 10**9},
        {"sequences": 0},
        {"prompt_tokens": -1},
    ],
)
def test_absurd_reports_fall_back_to_the_prior_and_say_so_once(
    bad: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    costs, good = Costs(), Work(2, 0.02, 8, 0)
    costs.look(0, {"a": stats(Work())}, IDLE)
    costs.look(1, {"a": stats(good, 4)}, IDLE)
    assert costs.cost("a").confidence > 0
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            costs.look(2 + number, {"a": stats(replace(good, steps=4 + number, **bad), 4)}, IDLE)
    fallback = costs.cost("a")
    assert replace(fallback, fault=None) == PRIOR
    assert fallback.fault is not None
    assert fallback.fault.startswith("it reported steps of ")
    assert len(caplog.records) == 1
    costs.look(9, {"a": stats(Work(100, 10, 1000, 0))}, IDLE)
    for number in range(1, 3):  # the next good report is believed
        costs.look(10 + number, {"a": stats(Work(100 + number, 10 + 0.01 * number, 1000 + 4 * number, 0), 4)}, IDLE)
    assert costs.cost("a").fault is None


@pytest.mark.parametrize("before", [Work(100, 1.0, 400, 0), Work(1, 0.5, 60, 900)])
def test_a_restarted_engine_counts_from_zero(before: Work) -> None:
    costs = Costs()
    costs.look(0, {"a": stats(before)}, IDLE)
    costs.look(1, {"a": stats(Work(2, 0.02, 8, 0), 4)}, IDLE)
    assert costs.cost("a").fault is None


def test_confidence_falls_while_an_engine_has_no_new_samples() -> None:
    costs, work = Costs(), Work()
    for number in range(30):
        work = work.plus(0.01, 4, 0)
        costs.look(number, {"a": stats(work, 4)}, IDLE)
    assert costs.cost("a").confidence > 0.7
    costs.look(30 + 2 * STALE_S, {"a": stats(work)}, IDLE)
    assert costs.cost("a").confidence < 0.2


def test_an_engine_in_its_first_step_computes_beside_the_others() -> None:
    """It reports no running request before the step has ended."""
    costs, work = Costs(), Work()
    first_step = replace(stats(Work()), grant=Grant(0.5, 8, 2048))
    for number in range(30):
        costs.look(number, {"a": stats(work, 4), "b": first_step}, {"a": 4, "b": 1})
        work = work.plus(0.01, 4, 0)
    assert costs.cost("a").confidence < ENOUGH
