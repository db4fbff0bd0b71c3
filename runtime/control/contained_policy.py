"""A policy under guard: whatever it does, the service goes on with the last good decision.

Refused are a policy that raises or takes too long, and a decision with a grant that cannot be (NaN, beyond an engine's
bounds, for an engine that is not there) or that together goes beyond the budget.
"""

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Self

from runtime.config import PolicyChoice
from runtime.control import catalogue
from runtime.control.policy import Decision, Policy
from runtime.control.snapshot import Snapshot
from runtime.daemon_thread import DaemonExecutor

LIMIT_S = 0.5


@dataclass(frozen=True)
class Judged:
    """What a policy decided; or None, and what was wrong with it."""

    decision: Decision | None
    fault: str | None = None


class ContainedPolicy:
    """Asks a policy in a thread of `executor`, so that one that never returns stops nobody; without one, as on a
    simulation's clock, in the caller's."""

    def __init__(self, name: str, policy: Policy, executor: Executor | None = None, limit_s: float = LIMIT_S) -> None:
        self.name = name
        self._policy = policy
        self._executor = executor
        self._limit_s = limit_s
        self._asked: asyncio.Future[Decision] | None = None

    async def decide(self, snapshot: Snapshot) -> Judged:
        """The decision, or what was wrong. Never raises."""
        if self._asked is not None and not self._asked.done():
            return Judged(None, f"policy {self.name} has not answered yet")
        try:
            decision = await self._ask(snapshot)
        except TimeoutError:
            return Judged(None, f"policy {self.name} took more than {self._limit_s:g} s")
        except Exception as error:  # noqa: BLE001  a third party's policy may raise anything
            return Judged(None, f"policy {self.name} raised {error!r}")
        fault = _fault(snapshot, decision)
        return Judged(None, f"policy {self.name}: {fault}") if fault else Judged(decision)

    async def _ask(self, snapshot: Snapshot) -> Decision:
        if self._executor is None:
            return self._decide(snapshot)
        self._asked = asked = asyncio.get_running_loop().run_in_executor(self._executor, self._decide, snapshot)
        async with asyncio.timeout(self._limit_s):
            return await asyncio.shield(asked)

    def _decide(self, snapshot: Snapshot) -> Decision:
        """Return the policy's decision as it stands from now on.

        A third party's grants are copied and its reasons worded here, within its time and its thread: they may be lazy
        objects that raise, hang, or change with the policy's state. Reasons of shipped policies are pure functions of
        the snapshot, and are worded when somebody reads or logs them.
        """
        decision = self._policy.decide(snapshot)
        if not isinstance(decision, Decision):
            raise TypeError(f"{decision!r} is no Decision")
        if catalogue.is_shipped(self._policy):
            return decision
        return Decision(dict(decision.grants), {name: str(reason) for name, reason in decision.reasons.items()})


class ContainedPolicies:
    """A context manager over the configured policy and its shadow, each contained.

    A third party's policy is asked in a thread of its own; leaving ends the threads and waits for none that hangs. A
    shipped policy decides faster than a thread wakes, so it is asked on the event loop, as every policy is if `threads`
    is False. Making it raises ConfigError or PluginError.
    """

    def __init__(self, policy: PolicyChoice, shadow: PolicyChoice | None = None, threads: bool = True) -> None:
        self._threads = threads
        self._executors: list[DaemonExecutor] = []
        self.policy = self.contain(policy)
        self.shadow = self.contain(shadow, "control.shadow") if shadow else None

    def contain(self, choice: PolicyChoice, place: str = "control.policy") -> ContainedPolicy:
        """Make a policy; `place` is its key in error messages. Raises ConfigError or PluginError."""
        policy = catalogue.make(choice.name, choice.options, place)
        if not self._threads or catalogue.is_shipped(policy):
            return ContainedPolicy(choice.name, policy)
        executor = DaemonExecutor(f"policy {choice.name}")
        self._executors.append(executor)
        return ContainedPolicy(choice.name, policy, executor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for executor in self._executors:
            executor.shutdown()


def _fault(snapshot: Snapshot, decision: Decision) -> str | None:
    """What is wrong with a decision; None when it can be applied."""
    for name, grant in decision.grants.items():
        if name not in snapshot.engines:
            return f"there is no engine {name!r}"
        if complaint := snapshot.engines[name].limits.complaint(grant):
            return f"engine {name}: {complaint}"
    held = 0
    for name, view in snapshot.engines.items():
        grant = decision.grants.get(name, view.grant)
        held += view.limits.held_bytes(grant.gpu_memory_utilization)
    before = sum(view.limits.held_bytes(view.grant.gpu_memory_utilization) for view in snapshot.engines.values())
    if held > max(snapshot.budget_bytes, 0) and held > before:
        return f"the engines would hold {held} bytes; the budget is {snapshot.budget_bytes}"
    return None
