"""Calls are predicted from the jobs that run, and from how earlier jobs of their kind went."""

import pytest

from runtime.events import CallPaused, JobAdvanced, JobEnded
from runtime.residency.call_times import CallTimes

KIND = frozenset({"planner", "solver", "critic"})
OTHER = frozenset({"planner", "solver", "judge"})


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def times(clock: Clock) -> CallTimes:
    times = CallTimes(clock)
    times.seat({"planner": "p", "solver": "s", "critic": "c", "judge": "j"})
    return times


def play(times: CallTimes, clock: Clock, kind: frozenset[str] = KIND, judge: str = "critic") -> None:
    """Play a job of a 1-s plan, a 4-s solution and a verdict."""
    times.on_event(JobAdvanced("earlier", "", {"planner": 1}, None, kind))
    clock.now_s += 1
    times.on_event(JobAdvanced("earlier", "planner", {"solver": 1}, {judge: 1}, kind))
    clock.now_s += 4
    times.on_event(JobAdvanced("earlier", "solver", {judge: 1}, {}, kind))
    clock.now_s += 2
    times.on_event(JobAdvanced("earlier", judge, {}, {}, kind))
    times.on_event(JobEnded("earlier", "42", None, 7.0))


def test_calls_that_follow_directly_or_not_are_expected_after_the_calls_before_them(
    times: CallTimes, clock: Clock
) -> None:
    play(times, clock)
    assert times.next_call_s() == {}
    times.on_event(JobAdvanced("j", "", {"planner": 1}, None, KIND))
    assert times.next_call_s() == pytest.approx({"s": 1, "c": 5})
    clock.now_s += 0.75
    assert times.next_call_s() == pytest.approx({"s": 0.25, "c": 4.25})
    clock.now_s += 10
    assert times.next_call_s() == pytest.approx({"s": 0, "c": 4})  # late, so it may end at any moment
    assert times.next_call_s(absent=["p"]) == pytest.approx({"s": 1, "c": 5})  # it has not begun
    times.on_event(JobEnded("j", None, "cancelled", 1.0))
    assert times.next_call_s() == {}


def test_the_soonest_job_counts(times: CallTimes, clock: Clock) -> None:
    play(times, clock)
    times.on_event(JobAdvanced("a", "", {"planner": 1}, None, KIND))
    times.on_event(JobAdvanced("b", "", {"solver": 1}, {}, KIND))
    clock.now_s += 3.5
    assert times.next_call_s() == pytest.approx({"s": 0, "c": 0.5})


def test_jobs_of_another_kind_say_nothing_about_seats_that_this_one_does_not_call(
    times: CallTimes, clock: Clock
) -> None:
    play(times, clock)
    times.on_event(JobAdvanced("j", "", {"planner": 1}, None, OTHER))
    assert times.next_call_s() == pytest.approx({"s": 1, "j": 1})  # the first of its kind: nothing says in which order
    times.on_event(JobEnded("j", None, "cancelled", 0.1))
    play(times, clock, OTHER, "judge")
    times.on_event(JobAdvanced("j", "", {"planner": 1}, None, OTHER))
    assert times.next_call_s() == pytest.approx({"s": 1, "j": 5})


def test_certain_calls_that_followed_on_nothing_yet_are_expected_next(times: CallTimes, clock: Clock) -> None:
    play(times, clock)
    times.on_event(JobAdvanced("j", "", {"planner": 1}, {"judge": 1}, KIND))
    assert times.next_call_s()["j"] == pytest.approx(1)


def test_rare_followers_are_expected_if_many_calls_are_open(times: CallTimes, clock: Clock) -> None:
    play(times, clock)
    for _ in range(10):
        times.on_event(JobAdvanced("again", "", {"critic": 1}, {}, KIND))
        times.on_event(JobAdvanced("again", "critic", {"solver": 1} if _ == 9 else {}, {}, KIND))
        times.on_event(JobEnded("again", "42", None, 1.0))
    times.on_event(JobAdvanced("one", "", {"critic": 1}, {}, KIND))
    assert "s" not in times.next_call_s()
    times.on_event(JobAdvanced("many", "", {"critic": 20}, {}, KIND))
    assert "s" in times.next_call_s()


def test_lead_is_the_time_from_a_jobs_beginning_to_its_first_call(times: CallTimes, clock: Clock) -> None:
    assert times.lead_s() == {}
    play(times, clock)
    assert times.lead_s() == pytest.approx({"p": 0, "s": 1, "c": 5})


def test_call_that_waits_for_a_tool_is_expected_back_at_any_time(times: CallTimes, clock: Clock) -> None:
    play(times, clock)
    times.on_event(JobAdvanced("j", "", {"solver": 1}, {"critic": 1}, KIND))
    assert times.next_call_s() == pytest.approx({"c": 4})
    times.on_event(CallPaused("j", "solver", True))
    clock.now_s += 1
    assert times.next_call_s() == pytest.approx({"s": 0, "c": 3})
    times.on_event(CallPaused("j", "solver", False))
    assert times.next_call_s() == pytest.approx({"c": 3})
    times.on_event(CallPaused("unknown", "solver", True))
    times.on_event(JobEnded("j", None, "cancelled", 1.0))
    assert times.next_call_s() == {}
