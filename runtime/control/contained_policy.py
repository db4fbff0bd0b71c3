"""Policies whose faults are contained: the service keeps the last good grants, whatever a policy does.

Refuses a policy that raises or takes too long, a grant outside its engine's bounds (NaN included) or for an unknown
engine, grants that exceed the budget together, a pause without a reason, and grants that pause the admission of every
engine with work. Ends pauses that are overdue.
"""

import asyncio
import weakref
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from operator import index
from typing import Self

from runtime.config import PolicyChoice
from runtime.control import catalogue, pauses
from runtime.control.policy import Decision, Policy, Reasons
from runtime.control.snapshot import Snapshot
from runtime.daemon_thread import DaemonExecutor
from runtime.engines.grant import Grant

TIME_LIMIT_S = 0.5


@dataclass(frozen=True)
class Answer:
    """A policy's decision; or, if it was refused, None and the fault."""

    decision: Decision | None
    fault: str | None = None

    @property
    def grants(self) -> Mapping[str, Grant]:
        """The grants of the decision; empty if there is none."""
        return self.decision.grants if self.decision else {}


class ContainedPolicy:
    """A wrapper of a policy that never raises and returns only decisions that can be applied and starve no engine.

    With an `executor`, it decides in the executor's thread within `limit_s` seconds, so that a policy that hangs blocks
    nothing. Without one (built-in policies, and simulations on a virtual clock), it decides in the caller's thread,
    without a time limit. `choice` is what it was made from.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        executor: Executor | None = None,
        limit_s: float = TIME_LIMIT_S,
        choice: PolicyChoice | None = None,
    ) -> None:
        self.name = name
        self.choice = choice or PolicyChoice(name=name)
        self._policy = policy
        self._executor = executor
        self._limit_s = limit_s
        self._pending: asyncio.Future[Decision] | None = None

    async def decide(self, snapshot: Snapshot) -> Answer:
        """Return the policy's decision or its fault. Never raises.

        A policy that exceeded its time limit is not called again until it has returned.
        """
        if self._pending is not None and not self._pending.done():
            return Answer(None, f"policy {self.name} is still busy with an earlier decision")
        try:
            decision = await self._call(snapshot)
            fault = _fault(snapshot, decision)
        except TimeoutError:
            return Answer(None, f"policy {self.name} took more than {self._limit_s:g} s")
        except Exception as error:  # noqa: BLE001  a third-party policy may raise anything
            return Answer(None, f"policy {self.name} raised {error!r}")
        return Answer(None, f"policy {self.name}: {fault}") if fault else Answer(without_starving(snapshot, decision))

    async def _call(self, snapshot: Snapshot) -> Decision:
        if self._executor is None:
            return self._decide(snapshot)
        self._pending = asyncio.get_running_loop().run_in_executor(self._executor, self._decide, snapshot)
        async with asyncio.timeout(self._limit_s):
            return await asyncio.shield(self._pending)

    def _decide(self, snapshot: Snapshot) -> Decision:
        """Return the policy's decision, copied if it is a third party's.

        A third party's grants and reasons may be lazy objects that raise, hang, or change with the policy's state, so
        they are checked, copied and formatted here, within the policy's thread and time limit. The reasons of built-in
        policies are pure functions of the snapshot and are formatted only when they are read or logged.
        """
        decision = self._policy.decide(snapshot)
        if not isinstance(decision, Decision):
            raise TypeError(f"decide() returned {decision!r} instead of a Decision")
        if catalogue.is_shipped(self._policy):
            return decision
        return Decision(
            {name: _copied(name, grant) for name, grant in decision.grants.items()},
            {name: str(reason).encode(errors="replace").decode() for name, reason in decision.reasons.items()},
        )


class ContainedPolicies:
    """A context manager that owns the configured policy and its shadow, each contained.

    A third-party policy decides in a thread of its own, which ends when the policy is replaced or the context is left.
    Neither waits for one that hangs. A built-in policy decides faster than a thread wakes up, so it runs on the event
    loop, as every policy does if `threads` is False. The constructor raises ConfigError or PluginError.
    """

    def __init__(self, policy: PolicyChoice, shadow: PolicyChoice | None = None, threads: bool = True) -> None:
        self._choice, self._shadow = policy, shadow
        self._threads = threads
        self._executors: weakref.WeakSet[DaemonExecutor] = weakref.WeakSet()
        self.policy, self.shadow = self.make()

    def make(self) -> tuple[ContainedPolicy, ContainedPolicy | None]:
        """Create the configured policy and its shadow, for another device. Raises what the constructor raises."""
        return self.contain(self._choice), self.contain(self._shadow, "control.shadow") if self._shadow else None

    def contain(self, choice: PolicyChoice, place: str = "control.policy") -> ContainedPolicy:
        """Create and contain a policy. Raises ConfigError or PluginError; `place` is the key that errors name."""
        policy = catalogue.make(choice.name, choice.options, place)
        if not self._threads or catalogue.is_shipped(policy):
            return ContainedPolicy(choice.name, policy, choice=choice)
        executor = DaemonExecutor(f"policy {choice.name}")
        self._executors.add(executor)
        contained = ContainedPolicy(choice.name, policy, executor, choice=choice)
        weakref.finalize(contained, executor.shutdown)  # end the thread of a policy that has been replaced
        return contained

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for executor in self._executors:
            executor.shutdown()


def _copied(name: str, grant: Grant) -> Grant:
    """Return a third party's grant with Python's own numbers. Raise TypeError if it is no grant."""
    try:
        return Grant(
            float(grant.gpu_memory_utilization),
            index(grant.max_active_seqs),
            index(grant.max_step_tokens),
            bool(grant.preempt),
        )
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise TypeError(
            f"engine {name}: {grant!r} is not a Grant(gpu_memory_utilization: float, max_active_seqs: int, "
            "max_step_tokens: int)"
        ) from None


def without_starving(snapshot: Snapshot, decision: Decision) -> Decision:
    """Return a decision, changed so that no engine starves."""
    overdue = pauses.end_overdue(snapshot, decision.grants)
    if not overdue:
        return decision
    return Decision(
        {**decision.grants, **{name: grant for name, (grant, _) in overdue.items()}},
        {**decision.reasons, **{name: reason for name, (_, reason) in overdue.items()}},
    )


def held_bytes(snapshot: Snapshot, grants: Mapping[str, Grant]) -> int:
    """Return the bytes that the engines of a snapshot hold together with new grants, or their present ones."""
    return sum(
        view.limits.held_bytes(grants.get(name, view.grant).gpu_memory_utilization)
        for name, view in snapshot.engines.items()
    )


def _fault(snapshot: Snapshot, decision: Decision) -> str | None:
    """Return why a decision cannot be applied, or None."""
    engines = snapshot.engines
    for name, grant in decision.grants.items():
        if name not in engines:
            return f"there is no engine {name!r}; the engines are {', '.join(engines)}"
        if violation := engines[name].limits.violation(grant):
            return f"engine {name}: {violation}"
        # The reasons of built-in policies are not formatted here, because they are formatted only when they are read.
        if pauses.is_paused(grant) and not isinstance(decision.reasons, Reasons) and not decision.reasons.get(name):
            return f"engine {name}: it pauses admission (max_active_seqs is 0) without a reason; add one to `reasons`"
    if pauses.starves(snapshot, decision.grants):
        return (
            "it pauses the admission of every engine that has requests; at least one must have max_active_seqs above 0"
        )
    before_bytes, after_bytes = held_bytes(snapshot, {}), held_bytes(snapshot, decision.grants)
    # A decision that shrinks is applied even if the result still exceeds a budget that was cut.
    if after_bytes > max(snapshot.budget_bytes, 0) and after_bytes > before_bytes:
        return f"the engines would hold {after_bytes} bytes; the budget is {snapshot.budget_bytes} bytes"
    return None
