"""A pause ends in time, whatever the policy does."""

from dataclasses import replace
from typing import Any

from runtime.control import pauses
from runtime.control.snapshot import EngineView
from tests.runtime.control.builders import LIMITS, snapshot, view


def paused(name: str, for_s: float, **changes: Any) -> EngineView:
    seen = view(name, paused_s=for_s, **changes)
    return replace(seen, grant=replace(seen.grant, max_active_seqs=0))


def test_an_overdue_engine_is_admitted_with_the_memory_that_the_decision_gives_it() -> None:
    seen = snapshot(
        paused("a", pauses.MOST_S + 1, in_flight=3, oldest_wait_s=pauses.MOST_S + 1), view("b", in_flight=9)
    )
    decided = {"a": replace(seen.engines["a"].grant, gpu_memory_utilization=0.123)}
    grant, reason = pauses.end_overdue(seen, decided)["a"]
    assert grant == replace(decided["a"], max_active_seqs=LIMITS.seqs_ceiling)
    assert reason == "was paused for 31 s: admits requests"
    assert set(pauses.end_overdue(seen, {})) == {"a"}  # the policy failed, and changes nothing


def test_pauses_that_are_short_or_make_nobody_wait_stay() -> None:
    seen = snapshot(
        paused("short", pauses.MOST_S - 1, in_flight=3, oldest_wait_s=2 * pauses.MOST_S),
        paused("idle", pauses.MOST_S + 1),
        paused("was idle", pauses.MOST_S + 1, in_flight=1, oldest_wait_s=1),
        paused("drains", pauses.MOST_S + 1, in_flight=2, running=2),
        view("admitted", in_flight=9),
    )
    assert pauses.end_overdue(seen, {}) == {}


def test_an_engine_that_reports_requests_as_running_but_makes_no_step_is_overdue_too() -> None:
    seen = snapshot(
        paused("a", pauses.MOST_S + 1, in_flight=2, running=2, stalled_s=pauses.MOST_S + 1), view("b", in_flight=9)
    )
    assert set(pauses.end_overdue(seen, {})) == {"a"}


def test_requests_of_an_engine_that_has_completed_no_reply_for_long_are_not_preempted() -> None:
    seen = snapshot(
        *(view(name, in_flight=3, unanswered_s=pauses.MOST_S + more) for name, more in (("a", 1), ("b", -1)))
    )
    ended = {name: replace(v.grant, max_active_seqs=0, preempt=True) for name, v in seen.engines.items()}
    changed = pauses.end_overdue(seen, ended)
    assert changed == {
        "a": (replace(ended["a"], preempt=False), "no reply was completed for 31 s: paused without preempting")
    }


def test_a_decision_starves_if_it_pauses_every_engine_with_requests() -> None:
    seen = snapshot(view("a", in_flight=3), view("b", in_flight=1), view("idle"))
    stop = {name: replace(seen.engines[name].grant, max_active_seqs=0) for name in seen.engines}
    assert pauses.starves(seen, {name: stop[name] for name in "ab"})
    assert not pauses.starves(seen, {"a": stop["a"], "idle": stop["idle"]})
    assert not pauses.starves(snapshot(view("a"), view("b")), {name: stop[name] for name in "ab"})
