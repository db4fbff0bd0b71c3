"""Residency policies decide as their documentation says, and never exceed the budget."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.handle import EngineState
from runtime.errors import ConfigError
from runtime.residency import catalogue
from runtime.residency.idle_times import LATEST, IdleTimes
from runtime.residency.policy import HELD_S, ResidencyDecision
from runtime.residency.snapshot import Residence, ResidencySnapshot

ALL = ("keep", "ttl", "lru", "histogram", "job_graph")
ON_DEMAND = ("ttl", "lru", "histogram", "job_graph")
READY, COLD = EngineState.READY, EngineState.COLD


def awake(name: str, **fields: object) -> Residence:
    """Return an engine of 10 bytes that has been idle for 5 s and awake for a minute, and that no job will call."""
    idle = {} if fields.get("calls") else {"idle_s": 5.0, "next_call_s": math.inf}
    return replace(Residence(name, READY, 10, awake_s=60, sleep_s=0.1, wake_s=1), **{**idle, **fields})  # type: ignore[arg-type]


def asleep(name: str, **fields: object) -> Residence:
    """Return a sleeping engine of 10 bytes that no job will call, unless it has calls."""
    idle = {} if fields.get("calls") else {"idle_s": 100.0, "next_call_s": math.inf}
    return replace(Residence(name, COLD, 10, sleep_s=0.1, wake_s=1), **{**idle, **fields})  # type: ignore[arg-type]


def decide(policy: str, *engines: Residence, budget: int = 20, **options: object) -> ResidencyDecision:
    seen = ResidencySnapshot(1000.0, budget, {engine.name: engine for engine in engines})
    return catalogue.make(policy, options).decide(seen)


@pytest.mark.parametrize("policy", ALL)
def test_an_engine_wakes_for_a_call_if_memory_is_free(policy: str) -> None:
    decision = decide(policy, awake("a", idle_s=0.1), asleep("b", calls=1))
    assert (decision.sleep, decision.wake) == ((), ("b",))
    assert decision.reasons["b"]


@pytest.mark.parametrize("policy", ON_DEMAND)
def test_the_least_recently_called_engine_makes_room(policy: str) -> None:
    decision = decide(policy, awake("a", idle_s=0.2), awake("b", idle_s=0.7), asleep("c", calls=1))
    assert decision.wake == ("c",)
    assert len(decision.sleep) == 1
    if policy != "job_graph":
        assert decision.sleep == ("b",)


@pytest.mark.parametrize("policy", ON_DEMAND)
def test_engines_with_calls_stay_until_a_request_was_held_for_too_long(policy: str) -> None:
    busy = (awake("a", calls=3), awake("b", calls=1))
    assert decide(policy, *busy, asleep("c", calls=1, held_s=HELD_S - 1)) == ResidencyDecision()
    overdue = decide(policy, *busy, asleep("c", calls=1, held_s=HELD_S))
    assert (len(overdue.sleep), overdue.wake) == (1, ("c",))


@pytest.mark.parametrize("policy", ON_DEMAND)
@pytest.mark.parametrize("staying", [{"awake_s": 1.9}, {"may_sleep": False}])
def test_engines_that_have_to_stay_make_no_room(policy: str, staying: dict[str, object]) -> None:
    engines = (awake("a", **staying), awake("b", **staying), asleep("c", calls=1, held_s=HELD_S))
    assert decide(policy, *engines) == ResidencyDecision()


def test_an_engine_that_drains_counts_as_gone() -> None:
    drains = awake("b", state=EngineState.DRAINING)
    assert decide("lru", awake("a"), drains, asleep("c", calls=1)).sleep == ()


def test_the_most_urgent_and_longest_held_requests_come_first() -> None:
    held = (
        asleep("a", calls=1, held_s=5, priority=2),
        asleep("b", calls=1, held_s=1),
        asleep("c", calls=1, held_s=2),
    )
    assert decide("lru", *held, budget=20).wake == ("c", "b")


def test_keep_wakes_all_engines_and_lets_none_sleep() -> None:
    assert decide("keep", awake("a", idle_s=1e6), asleep("b"), budget=100) == ResidencyDecision(
        wake=("b",), reasons={"b": "every engine stays awake"}
    )


def test_ttl_lets_engines_sleep_after_their_time() -> None:
    assert decide("ttl", awake("a", idle_s=9.9), awake("b", idle_s=10), idle_s=10).sleep == ("b",)
    assert decide("ttl", awake("a", idle_s=299)).sleep == ()


def test_lru_lets_no_engine_sleep_while_nobody_needs_its_memory() -> None:
    assert decide("lru", awake("a", idle_s=1e6)) == ResidencyDecision()


def test_histogram_sleeps_wakes_and_sleeps_by_earlier_idle_times() -> None:
    seen = IdleTimes([30, 32, 34, 36, 38, 40])

    def at(idle_s: float, state: EngineState) -> ResidencyDecision:
        engine = replace(awake("a"), state=state, idle_s=idle_s, idle_times=seen)
        return decide("histogram", engine)

    assert at(5, READY).sleep == ("a",)
    assert at(5, COLD) == ResidencyDecision()
    assert at(26.5, COLD).wake == ("a",)  # 90% of 30 s, less a second to wake
    assert at(26.5, READY) == ResidencyDecision()
    assert at(44.1, READY).sleep == ("a",)  # 110% of 40 s


def test_histogram_keeps_an_engine_for_a_fixed_time_until_it_knows_enough() -> None:
    seen = IdleTimes([30, 32, 34, 36])
    assert decide("histogram", awake("a", idle_s=19, idle_times=seen), idle_s=20) == ResidencyDecision()
    assert decide("histogram", awake("a", idle_s=20, idle_times=seen), idle_s=20).sleep == ("a",)


def test_job_graph_wakes_an_engine_shortly_before_a_job_calls_it() -> None:
    assert decide("job_graph", awake("a", calls=1), asleep("b", next_call_s=1.3)) == ResidencyDecision()
    assert decide("job_graph", awake("a", calls=1), asleep("b", next_call_s=1.2)).wake == ("b",)


def test_job_graph_makes_room_only_with_engines_that_are_called_later() -> None:
    busy, soon = awake("a", calls=1), asleep("c", next_call_s=1.0)
    # c is called in 1 s; to sleep and wake again beside it takes 1 + 0.1 + 1 s
    assert decide("job_graph", busy, awake("b", next_call_s=3.0), soon) == ResidencyDecision()
    swapped = decide("job_graph", busy, awake("b", next_call_s=3.2), soon)
    assert (swapped.sleep, swapped.wake) == (("b",), ("c",))


def test_job_graph_lets_the_engine_leave_whose_place_is_worth_least() -> None:
    engines = (awake("soon", next_call_s=2.0), awake("late", next_call_s=60.0), awake("never"))
    assert decide("job_graph", *engines, asleep("x", calls=1), budget=30).sleep == ("never",)
    assert decide("job_graph", *engines[:2], asleep("x", calls=1)).sleep == ("late",)
    cheap = replace(engines[1], wake_s=0.001)
    assert decide("job_graph", replace(engines[0], next_call_s=60.0), cheap, asleep("x", calls=1)).sleep == ("late",)


def test_job_graph_lets_engines_sleep_that_no_job_will_call() -> None:
    assert decide("job_graph", awake("a", idle_s=129, awake_s=200), awake("b", idle_s=130, awake_s=130)).sleep == ("b",)
    assert decide("job_graph", awake("a", idle_s=500, awake_s=500, next_call_s=20.0)).sleep == ()
    assert decide("job_graph", awake("a", idle_s=500, awake_s=129)).sleep == ()  # it woke ahead of a call


def test_job_graph_keeps_the_engines_longest_that_a_job_would_wait_for() -> None:
    meanwhile = awake("a", idle_s=65, awake_s=100, lead_s=0.5)  # half of its wake passes while a job works elsewhere
    assert decide("job_graph", meanwhile).sleep == ("a",)
    assert decide("job_graph", replace(meanwhile, idle_s=64)).sleep == ()
    assert decide("job_graph", replace(meanwhile, idle_s=26, lead_s=10)).sleep == ("a",)
    assert decide("job_graph", replace(meanwhile, idle_s=25, lead_s=10)).sleep == ()


def test_job_graph_learns_how_long_to_stay() -> None:
    bursts = IdleTimes([1, 2, 1, 3, 2, 1, 500, 600, 700, 500, 600])  # short gaps in a burst, long ones between bursts
    stays = awake("a", idle_s=3.2, awake_s=100, idle_times=bursts)
    assert decide("job_graph", stays).sleep == ()
    assert decide("job_graph", replace(stays, idle_s=3.4)).sleep == ("a",)
    too_few = IdleTimes([1, 2, 1, 3, 2, 1, 500, 600])
    assert decide("job_graph", replace(stays, idle_s=80, idle_times=too_few)).sleep == ()
    worth_it = IdleTimes([1, 2, 1, 3, 2, 1, 30, 40, 30, 40, 30])
    assert decide("job_graph", replace(stays, idle_s=80, idle_times=worth_it)).sleep == ()


def test_job_graph_wakes_engines_one_after_the_other_in_time() -> None:
    waking = asleep("b", state=EngineState.WAKING)
    later = asleep("c", next_call_s=2.4)
    assert decide("job_graph", awake("a", calls=1), later, budget=100) == ResidencyDecision()
    assert decide("job_graph", awake("a", calls=1), waking, later, budget=100).wake == ("c",)


@pytest.mark.parametrize("policy", ALL)
def test_engines_sleep_if_the_budget_becomes_too_small(policy: str) -> None:
    cut = decide(policy, awake("a", idle_s=1), awake("b", idle_s=2), budget=10)
    assert len(cut.sleep) == (0 if policy == "keep" else 1)


def test_policies_serve_held_requests_before_they_wake_ahead() -> None:
    engines = (awake("a", calls=1), asleep("b", calls=1, awake_bytes=15), asleep("c", next_call_s=0.1))
    assert decide("job_graph", *engines) == ResidencyDecision()


@given(
    st.lists(
        st.builds(
            Residence,
            name=st.uuids().map(str),
            state=st.sampled_from([READY, COLD, EngineState.ASLEEP, EngineState.DRAINING, EngineState.WAKING]),
            awake_bytes=st.integers(1, 50),
            asleep_bytes=st.integers(0, 1),
            calls=st.integers(0, 2),
            held_s=st.floats(0, 40),
            idle_s=st.floats(0, 400),
            awake_s=st.floats(0, 10),
            next_call_s=st.one_of(st.floats(0, 10), st.just(math.inf)),
            wake_s=st.floats(0, 3),
            may_sleep=st.booleans(),
            idle_times=st.lists(st.floats(0, 100)).map(IdleTimes),
        ),
        max_size=8,
    ),
    st.integers(0, 200),
    st.sampled_from(ALL),
)
def test_every_decision_can_be_carried_out(engines: list[Residence], budget: int, policy: str) -> None:
    seen = ResidencySnapshot(0.0, budget, {engine.name: engine for engine in engines})
    decision = catalogue.make(policy).decide(seen)
    assert decision.reasons.keys() == {*decision.sleep, *decision.wake}
    assert len(decision.reasons) == len(decision.sleep) + len(decision.wake)
    assert all(seen.engines[name].sleeps for name in decision.wake)
    assert all(seen.engines[name].awake and seen.engines[name].may_sleep for name in decision.sleep)
    moved = {name: seen.engines[name].awake_bytes - seen.engines[name].asleep_bytes for name in decision.reasons}
    free = seen.free_bytes + sum(moved[name] for name in decision.sleep)
    if decision.wake:
        assert sum(moved[name] for name in decision.wake) <= free


def test_idle_times_give_quantiles_and_forget_old_values() -> None:
    times = IdleTimes(range(LATEST + 10))
    assert len(times) == LATEST
    assert times.quantile(0) == 10
    assert times.quantile(1) == LATEST + 9
    assert times.quantile(0.5, longer_than_s=LATEST) == LATEST + 5
    assert IdleTimes([1, 1, 1, 50, 50, 50, 50, 50]).cheapest_stay_s(10) == 1
    assert IdleTimes([1, 1, 1, 50, 50, 50, 50, 50]).cheapest_stay_s(1000) is None
    assert IdleTimes([9] * 10).cheapest_stay_s(5) == 0
    assert math.isinf(times.quantile(0.5, longer_than_s=1000))


def test_an_unknown_policy_or_option_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"residency\.policy\.name: no residency policy is named 'tll'.*did you mean ttl"
    ):
        catalogue.make("tll")
    with pytest.raises(ConfigError, match=r"residency\.policy\.idle: .*known keys are name, idle_s"):
        catalogue.make("ttl", {"idle": 3})
