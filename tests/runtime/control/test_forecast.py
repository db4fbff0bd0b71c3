"""The forecast counts calls from what workflows know and from how earlier jobs went."""

import pytest

from runtime.control.forecast import Forecast
from runtime.events import CallPaused, JobAdvanced, JobEnded

SEATS = {"planner": "p", "solver": "s", "critic": "c", "second": "c"}
ALL_RUN = {"p": 1.0, "s": 1.0, "c": 1.0}


@pytest.fixture
def forecast() -> Forecast:
    forecast = Forecast()
    forecast.seat(SEATS)
    return forecast


def play(forecast: Forecast, job: str = "j") -> None:
    """Send the events of a whole job: two steps in sequence, with two critics on one engine."""
    forecast.on_event(JobAdvanced(job, "", {"planner": 1}, None))
    forecast.on_event(JobAdvanced(job, "planner", {"solver": 1}, {"solver": 1, "critic": 2, "second": 2}))
    forecast.on_event(JobAdvanced(job, "solver", {"critic": 1, "second": 1}, {"solver": 1, "critic": 1, "second": 1}))
    forecast.on_event(JobAdvanced(job, "critic", {}, {"solver": 1, "critic": 1, "second": 1}))
    forecast.on_event(JobAdvanced(job, "second", {"solver": 1}, {"critic": 1, "second": 1}))
    forecast.on_event(JobAdvanced(job, "solver", {"critic": 1, "second": 1}, {}))
    forecast.on_event(JobAdvanced(job, "critic", {}, {}))
    forecast.on_event(JobAdvanced(job, "second", {}, {}))
    forecast.on_event(JobEnded(job, "42", None, 1.0))


def test_coming_counts_what_workflows_know_by_engine(forecast: Forecast) -> None:
    forecast.on_event(JobAdvanced("j", "", {"planner": 1}, None))
    assert not forecast.coming()
    forecast.on_event(JobAdvanced("j", "planner", {"solver": 1}, {"solver": 1, "critic": 2, "second": 2}))
    assert forecast.coming() == {"s": 1, "c": 4}
    forecast.on_event(JobAdvanced("k", "", {"solver": 1}, {"critic": 1}))
    assert forecast.coming() == {"s": 1, "c": 5}
    forecast.on_event(JobEnded("j", None, "failed", 1.0))
    assert {name: count for name, count in forecast.coming().items() if count} == {"c": 1}


def test_coming_expects_a_job_without_a_plan_to_resemble_earlier_jobs(forecast: Forecast) -> None:
    play(forecast)
    forecast.on_event(JobAdvanced("k", "", {"planner": 1}, None))
    assert {name: count for name, count in forecast.coming().items() if count} == {"s": 2, "c": 4}


def test_soon_expects_the_calls_that_followed_earlier_replies(forecast: Forecast) -> None:
    for number in range(200):
        play(forecast, str(number))
    forecast.on_event(JobAdvanced("a", "", {"planner": 4}, None))
    forecast.on_event(JobAdvanced("b", "", {"solver": 2}, {}))
    assert {name: count for name, count in forecast.open_calls().items() if count} == {"p": 4, "s": 2}
    soon = forecast.soon(ALL_RUN)
    assert soon["s"] == pytest.approx(4, rel=0.2)
    assert soon["c"] == pytest.approx(4, rel=0.2)  # two calls to solve, each followed by both critics
    assert forecast.soon({"p": 0.5, "s": 0.0, "c": 0.0})["s"] == pytest.approx(2, rel=0.2)


def test_ended_jobs_leave_no_expected_calls(forecast: Forecast) -> None:
    for number in range(5):
        play(forecast, str(number))
    assert not any(forecast.coming().values())
    assert not any(forecast.soon(ALL_RUN).values())
    forecast.on_event(JobEnded("never heard of", None, None, 0))


def test_calls_that_wait_for_tools_are_coming_and_not_open(forecast: Forecast) -> None:
    forecast.on_event(JobAdvanced("j", "", {"solver": 3}, {"critic": 1}))
    for waiting in (1, 2):
        forecast.on_event(CallPaused("j", "solver", True))
        assert forecast.open_calls() == {"s": 3 - waiting}
        assert forecast.coming() == {"s": waiting, "c": 1}
    forecast.on_event(JobAdvanced("j", "solver", {}, {"critic": 1}))
    assert (forecast.open_calls(), forecast.coming()) == ({"s": 0}, {"s": 2, "c": 1})
    forecast.on_event(CallPaused("j", "solver", False))
    assert (forecast.open_calls(), forecast.coming()) == ({"s": 1}, {"s": 1, "c": 1})
    forecast.on_event(JobEnded("j", None, "cancelled", 1.0))
    assert not any(forecast.open_calls().values())
    assert not any(forecast.coming().values())


def test_waiting_for_a_tool_teaches_nothing_about_followers(forecast: Forecast) -> None:
    play(forecast)
    before = forecast.soon(ALL_RUN)
    forecast.on_event(JobAdvanced("k", "", {"solver": 1}, {}))
    one = forecast.soon(ALL_RUN)
    forecast.on_event(CallPaused("k", "solver", True))
    assert forecast.soon(ALL_RUN) == before
    forecast.on_event(CallPaused("k", "solver", False))
    assert forecast.soon(ALL_RUN) == one
