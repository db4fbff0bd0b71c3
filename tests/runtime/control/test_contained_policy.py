"""A policy that does wrong is contained: nothing it does comes through, and what it did is said."""

import asyncio
import math
import threading
from collections.abc import Callable, Mapping
from typing import cast

import pytest

from agents.role import Value
from runtime.control import catalogue
from runtime.control.contained_policy import ContainedPolicy, Judged
from runtime.control.policy import Decision, Policy, Reasons
from runtime.control.snapshot import Snapshot
from runtime.daemon_thread import DaemonExecutor
from runtime.engines.grant import Grant
from tests.runtime.control.views import LIMITS, snapshot, view

SEEN = snapshot(view("a"), view("b"))


class Says(Policy):
    """Decides what it is told."""

    def __init__(self, answer: Callable[[Snapshot], object]) -> None:
        super().__init__(Value())
        self._answer = answer

    def decide(self, snapshot: Snapshot) -> Decision:
        return self._answer(snapshot)  # type: ignore[return-value]  # a wrong one is the point


def grants(**shares: float) -> Decision:
    return Decision({name: Grant(share, 64, 2048) for name, share in shares.items()}, dict.fromkeys(shares, "so"))


def fails(snapshot: Snapshot) -> object:
    raise ValueError("out of ideas")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (fails, "raised ValueError('out of ideas')"),
        (lambda s: None, "None is no Decision"),
        (lambda s: grants(a=math.nan), "engine a: gpu_memory_utilization nan"),
        (lambda s: grants(a=math.inf), "engine a: gpu_memory_utilization inf"),
        (lambda s: grants(a=0.01), "engine a: gpu_memory_utilization 0.01 is below the engine's floor of 0.1100"),
        (lambda s: grants(c=0.2), "there is no engine 'c'"),
        (lambda s: grants(a=0.4, b=0.4), "the engines would hold 838860800 bytes; the budget is 524288000"),
        (lambda s: Decision({"a": Grant(0.2, 1000, 2048)}), "engine a: max_active_seqs 1000 is not within 1 to 64"),
    ],
)
@pytest.mark.parametrize("threads", [False, True])
async def test_what_is_wrong_is_said_and_nothing_decided(
    answer: Callable[[Snapshot], object], says: str, threads: bool
) -> None:
    judged = await ContainedPolicy("mine", Says(answer), DaemonExecutor("t") if threads else None, limit_s=60).decide(
        SEEN
    )
    assert judged.decision is None
    assert judged.fault is not None
    assert judged.fault.startswith("policy mine")
    assert says in judged.fault


async def test_a_good_decision_passes_and_may_leave_engines_out() -> None:
    judged = await ContainedPolicy("mine", Says(lambda s: grants(a=0.25)), DaemonExecutor("t"), limit_s=60).decide(SEEN)
    assert judged.fault is None
    assert judged.decision == grants(a=0.25)


async def test_shrinking_is_fine_even_where_it_does_not_yet_fit() -> None:
    tight = snapshot(view("a", 400), view("b", 400), movable_mib=100)
    judged = await ContainedPolicy("mine", Says(lambda s: grants(a=0.3))).decide(tight)
    assert judged.fault is None


async def test_one_that_takes_too_long_is_not_waited_for_and_asked_again_only_when_it_is_through() -> None:
    through = threading.Event()
    asked = []

    def slow(snapshot: Snapshot) -> Decision:
        asked.append(1)
        through.wait(30)
        return grants(a=0.2)

    guard = ContainedPolicy("slow", Says(slow), DaemonExecutor("t"), limit_s=0.02)
    async with asyncio.timeout(60):
        assert (await guard.decide(SEEN)).fault == "policy slow took more than 0.02 s"
        assert (await guard.decide(SEEN)).fault == "policy slow has not answered yet"
        assert len(asked) == 1
        through.set()
        while (judged := await guard.decide(SEEN)).fault:  # noqa: ASYNC110  it is the guard that is asked again
            await asyncio.sleep(0.01)
    assert judged.decision == grants(a=0.2)


class Worder:
    """A policy's own lazy reason, over state that changes; counts how often it is put into words."""

    def __init__(self) -> None:
        self.text = "as it was"
        self.worded = 0

    def __str__(self) -> str:
        self.worded += 1
        if not self.text:
            raise RuntimeError("nothing to say")
        return self.text


@pytest.mark.parametrize("threads", [False, True])
async def test_a_third_partys_lazy_reasons_are_worded_at_once_and_contained(threads: bool) -> None:
    reason = Worder()
    answer = Decision({"a": Grant(0.25, 64, 2048)}, {"a": cast("str", reason)})
    guard = ContainedPolicy("mine", Says(lambda s: answer), DaemonExecutor("t") if threads else None)
    judged = await guard.decide(SEEN)
    assert judged.decision is not None
    reason.text = ""
    assert judged.decision.reasons == {"a": "as it was"}
    assert await guard.decide(SEEN) == Judged(None, "policy mine raised RuntimeError('nothing to say')")


@pytest.mark.parametrize("name", ["static", "round_robin", "paper", "modelclaim", "on_demand", "waterfill"])
async def test_reasons_of_shipped_policies_are_worded_only_when_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worded: list[int] = []
    original = Reasons.__init__

    def counting(self: Reasons, engines: Mapping[str, object], word: Callable[[int], str]) -> None:
        def count(place: int) -> str:
            worded.append(place)
            return word(place)

        original(self, engines, count)

    monkeypatch.setattr(Reasons, "__init__", counting)
    seen = snapshot(view("a", in_flight=3), view("b"))
    judged = await ContainedPolicy(name, catalogue.make(name)).decide(seen)
    assert judged.decision is not None
    assert worded == []
    assert judged.decision.reasons["b"]
    assert worded == [1]


def test_limits_of_the_tests() -> None:
    assert LIMITS.share(LIMITS.kv_floor_bytes) == 0.11
