"""Every fault of a policy is contained: no invalid decision passes, and the fault is described."""

import asyncio
import concurrent.futures
import math
import threading
from collections.abc import Callable, Mapping
from typing import cast

import pytest

from agents.role import Value
from runtime.control import catalogue
from runtime.control.contained_policy import Answer, ContainedPolicy
from runtime.control.decision_log import Record, to_line
from runtime.control.policy import Decision, Policy, Reasons
from runtime.control.snapshot import Snapshot
from runtime.daemon_thread import DaemonExecutor
from runtime.engines.grant import Grant
from tests.runtime.control.builders import snapshot, view

SEEN = snapshot(view("a"), view("b"))


class Scripted(Policy):
    """A policy that returns what a function returns."""

    def __init__(self, script: Callable[[Snapshot], object]) -> None:
        super().__init__(Value())
        self._script = script

    def decide(self, snapshot: Snapshot) -> Decision:
        return self._script(snapshot)  # type: ignore[return-value]  # tests return wrong types on purpose


def grants(**shares: float) -> Decision:
    return Decision({name: Grant(share, 64, 2048) for name, share in shares.items()}, dict.fromkeys(shares, "because"))


def fails(snapshot: Snapshot) -> object:
    raise ValueError("out of ideas")


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (fails, "raised ValueError('out of ideas')"),
        (lambda s: None, "decide() returned None instead of a Decision"),
        (lambda s: grants(a=math.nan), "engine a: gpu_memory_utilization nan"),
        (lambda s: grants(a=math.inf), "engine a: gpu_memory_utilization inf"),
        (lambda s: grants(a=0.01), "engine a: gpu_memory_utilization 0.01 is below the engine's floor of 0.1100"),
        (lambda s: grants(c=0.2), "there is no engine 'c'; the engines are a, b"),
        (lambda s: grants(a=0.4, b=0.4), "the engines would hold 838860800 bytes; the budget is 524288000 bytes"),
        (lambda s: Decision({"a": Grant(0.2, 1000, 2048)}), "engine a: max_active_seqs 1000"),
        (lambda s: Decision({"a": Grant(0.2, -1, 2048)}), "engine a: max_active_seqs -1"),
        (lambda s: Decision({"a": Grant(0.2, 64, -1)}), "engine a: max_step_tokens -1"),
        (lambda s: Decision({"a": Grant(0.2, 0, 2048)}, {"a": ""}), "engine a: it pauses admission"),
        (lambda s: Decision({"a": cast("Grant", None)}), "engine a: None is not a Grant"),
        (lambda s: Decision({"a": Grant(0.2, cast("int", None), 2048)}), "max_active_seqs=None"),
        (lambda s: Decision({"a": Grant(0.2, cast("int", 0.5), 2048)}), "max_active_seqs=0.5"),
        (lambda s: Decision({}, cast("Mapping[str, str]", None)), "has no attribute 'items'"),
    ],
    ids=[
        "raises",
        "no-decision",
        "nan",
        "inf",
        "below-floor",
        "unknown-engine",
        "over-budget",
        "too-many-sequences",
        "negative-sequences",
        "negative-step-tokens",
        "pause-without-reason",
        "no-grant",
        "no-number",
        "half-a-sequence",
        "no-reasons",
    ],
)
@pytest.mark.parametrize("threads", [False, True], ids=["inline", "thread"])
async def test_invalid_answer_is_refused_with_its_fault(
    script: Callable[[Snapshot], object], fault: str, threads: bool
) -> None:
    executor = DaemonExecutor("t") if threads else None
    answer = await ContainedPolicy("mine", Scripted(script), executor, limit_s=60).decide(SEEN)
    assert answer.decision is None
    assert answer.fault is not None
    assert answer.fault.startswith("policy mine")
    assert fault in answer.fault


@pytest.mark.parametrize(
    "error", [SystemExit(3), asyncio.CancelledError(), concurrent.futures.CancelledError()], ids=repr
)
async def test_what_would_end_the_process_or_the_controller_stays_in_the_policys_thread(error: BaseException) -> None:
    def ends(snapshot: Snapshot) -> object:
        raise error

    answer = await ContainedPolicy("mine", Scripted(ends), DaemonExecutor("t"), limit_s=60).decide(SEEN)
    assert type(error).__name__ in str(answer.fault)


async def test_a_reason_that_is_no_unicode_can_be_logged() -> None:
    decision = Decision({"a": Grant(0.25, 64, 2048)}, {"a": "half a \ud83d"})
    answer = await ContainedPolicy("mine", Scripted(lambda s: decision)).decide(SEEN)
    assert b"half a ?" in to_line(Record("mine", "tick", SEEN, answer.decision, answer.fault))


async def test_valid_decision_passes_and_may_omit_engines() -> None:
    policy = ContainedPolicy("mine", Scripted(lambda s: grants(a=0.25)), DaemonExecutor("t"), limit_s=60)
    answer = await policy.decide(SEEN)
    assert answer.fault is None
    assert answer.decision == grants(a=0.25)


async def test_shrinking_is_accepted_even_if_the_result_exceeds_a_cut_budget() -> None:
    tight = snapshot(view("a", 400), view("b", 400), movable_mib=100)
    answer = await ContainedPolicy("mine", Scripted(lambda s: grants(a=0.3))).decide(tight)
    assert answer.fault is None


async def test_slow_policy_is_not_called_again_before_it_returns() -> None:
    may_return = threading.Event()
    calls = []

    def slow(snapshot: Snapshot) -> Decision:
        calls.append(1)
        may_return.wait(30)
        return grants(a=0.2)

    policy = ContainedPolicy("slow", Scripted(slow), DaemonExecutor("t"), limit_s=0.02)
    async with asyncio.timeout(60):
        assert (await policy.decide(SEEN)).fault == "policy slow took more than 0.02 s"
        assert (await policy.decide(SEEN)).fault == "policy slow is still busy with an earlier decision"
        while not calls:  # noqa: ASYNC110  a busy machine may start the thread late
            await asyncio.sleep(0.01)
        assert len(calls) == 1
        may_return.set()
        while (answer := await policy.decide(SEEN)).fault:  # noqa: ASYNC110  the test polls the policy
            await asyncio.sleep(0.01)
    assert answer.decision == grants(a=0.2)


class LazyReason:
    """A reason that is formatted late, from state that changes."""

    def __init__(self) -> None:
        self.text = "original"

    def __str__(self) -> str:
        if not self.text:
            raise RuntimeError("nothing to say")
        return self.text


@pytest.mark.parametrize("threads", [False, True], ids=["inline", "thread"])
async def test_third_party_reasons_are_formatted_at_once_and_their_faults_contained(threads: bool) -> None:
    reason = LazyReason()
    decision = Decision({"a": Grant(0.25, 64, 2048)}, {"a": cast("str", reason)})
    policy = ContainedPolicy("mine", Scripted(lambda s: decision), DaemonExecutor("t") if threads else None)
    answer = await policy.decide(SEEN)
    assert answer.decision is not None
    reason.text = ""
    assert answer.decision.reasons == {"a": "original"}
    assert await policy.decide(SEEN) == Answer(None, "policy mine raised RuntimeError('nothing to say')")


@pytest.mark.parametrize("name", ["static", "round_robin", "paper", "modelclaim", "on_demand", "waterfill", "turns"])
async def test_reasons_of_built_in_policies_are_formatted_only_when_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formatted: list[int] = []
    original = Reasons.__init__

    def counting(self: Reasons, engines: Mapping[str, object], reason: Callable[[int], str]) -> None:
        def count(index: int) -> str:
            formatted.append(index)
            return reason(index)

        original(self, engines, count)

    monkeypatch.setattr(Reasons, "__init__", counting)
    seen = snapshot(view("a", in_flight=3), view("b"))
    answer = await ContainedPolicy(name, catalogue.make(name)).decide(seen)
    assert answer.decision is not None
    assert formatted == []
    assert answer.decision.reasons["b"]
    assert formatted == [1]
