"""Third-party policies are found by their entry points, and errors name the policy and the key."""

import asyncio
import gc
import threading
from pathlib import Path

import pytest

from runtime.config import Control, PolicyChoice
from runtime.control import catalogue
from runtime.control.contained_policy import ContainedPolicies
from runtime.errors import ConfigError, PluginError
from tests.plugins import lay_out
from tests.runtime.control.builders import sizes, snapshot, view

GROUP = "troupe.policies"
SOURCE = """
import time
from pydantic import Field
from agents.role import (Value)
from runtime.control.policy import Decision, Policy, bound, decision, fit


class First(Policy):
    class Options(Value):
        part: float = Field(default=0.5, gt=0, le=1)

    def decide(self, snapshot):
        wanted = [0.0] * len(snapshot.views)
        wanted[0] = snapshot.movable_bytes * self.options.part
        return decision(snapshot, fit(snapshot, bound(snapshot, wanted)), lambda index: "first engine first")


class Partial(Policy):
    pass


class Loose:
    pass


class Endless(Policy):
    def decide(self, snapshot):
        time.sleep(3600)


class Unmade(Policy):
    def __init__(self, options):
        raise RuntimeError("no licence")

    def decide(self, snapshot):
        return Decision()
"""
TARGETS = {name.lower(): f"first_kit:{name}" for name in ("First", "Partial", "Loose", "Unmade", "Endless")}


@pytest.fixture(autouse=True)
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lay_out(tmp_path, "first-kit", {GROUP: TARGETS}, {"first_kit": SOURCE}))


def test_third_party_policy_is_listed_and_decides_with_its_options() -> None:
    assert "first" in catalogue.names()
    seen = snapshot(view("a"), view("b"))
    assert sizes(catalogue.make("first", {"part": 0.8}).decide(seen), seen) == {"a": 240, "b": 10}
    with pytest.raises(ConfigError, match=r"control\.policy\.part"):
        catalogue.make("first", {"part": 2})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partial", r"Partial lacks decide\(\) of runtime.control.policy.Policy"),
        ("loose", "class Loose is not a policy: it must be a subclass of runtime.control.policy.Policy"),
        ("unmade", r"policy 'unmade' cannot be created: its constructor raised RuntimeError\('no licence'\)"),
    ],
)
def test_error_names_a_broken_policy(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        catalogue.make(name)


def test_unknown_shadow_policy_is_refused_before_any_engine_starts() -> None:
    choice = PolicyChoice(name="nothing")
    with pytest.raises(ConfigError, match=r"control\.shadow\.name: no policy is named 'nothing'"):
        ContainedPolicies(Control().policy, choice, threads=False)


async def test_only_third_party_policies_get_a_thread_and_a_time_limit() -> None:
    seen = snapshot(view("a"), view("b"))
    policies = ContainedPolicies(Control().policy)
    threads = threading.active_count()
    assert (await policies.policy.decide(seen)).fault is None
    assert threading.active_count() == threads
    endless = policies.contain(PolicyChoice(name="endless"))
    assert (await endless.decide(seen)).fault == "policy endless took more than 0.5 s"
    policies.__exit__()


async def test_a_third_party_policy_that_is_replaced_leaves_no_thread() -> None:
    policies = ContainedPolicies(Control().policy)
    threads = threading.active_count()
    replaced = policies.contain(PolicyChoice(name="first"))
    await replaced.decide(snapshot(view("a"), view("b")))
    assert threading.active_count() == threads + 1
    del replaced
    gc.collect()
    async with asyncio.timeout(10):
        while threading.active_count() > threads:  # noqa: ASYNC110 (a thread's end has no event)
            await asyncio.sleep(0.01)
