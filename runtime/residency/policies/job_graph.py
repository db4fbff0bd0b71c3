"""`job_graph`: wake engines before the running jobs call them.

A job's workflow and earlier jobs show which calls follow on which, and earlier calls show how long they take. So the
time t until an engine's next call is known while its job still works elsewhere. Without such a job, an engine's earlier
idle times give a guess.

- Engines that hold requests wake first, as under every policy. Engines with calls stay.
- An engine wakes ahead if t is at most `lead` times as long as it takes to wake, after those that wake already: engines
  wake one after the other. Its memory must be free, or held by engines that will be called later: after this engine's
  call, by the time that it takes to wake both.
- If memory is needed, the engine leaves whose place is worth least: with the largest t * bytes / wake_s.
- If an engine that no running job will call sleeps too early, its next job waits for it: for the time to wake, less the
  time that a job works elsewhere before it first calls this engine, and at least a fifth of the time to wake. A second
  of waiting costs `keep` seconds of idle memory. The engine stays for as long as would have cost the least over its
  latest idle times. Until enough are known, it stays for as long as the wait costs, which is at most twice as dear as
  the best decision in hindsight (the ski-rental bound).

So the engines with which jobs begin stay through the usual gaps, and those that can wake meanwhile sleep early.

Sources: the ski-rental rule, A. Karlin et al., "Competitive snoopy caching", 1988; weighing time, size and cost to
bring back, as A. Fuerst and P. Sharma, "FaasCache", ASPLOS 2021; waking along a chain of functions, as N. Daw et al.,
"Xanadu", Middleware 2020.
"""

import math

from pydantic import Field

from runtime.engines.handle import EngineState
from runtime.residency.policy import Moves, ResidencyDecision, ResidencyPolicy
from runtime.residency.snapshot import Residence, ResidencySnapshot

MARGIN = 0.1
"""The addition to the best time to stay, as a part of it."""
LEAST_WAIT = 0.2
"""The least wait for an engine that woke too late, as a part of the time that it takes to wake."""


class JobGraph(ResidencyPolicy):
    """A policy that wakes engines ahead of the calls that running jobs will make."""

    class Options(ResidencyPolicy.Options):
        """Options of `job_graph`."""

        lead: float = Field(
            default=1.2,
            ge=1,
            allow_inf_nan=False,
            description="The time by which an engine wakes early, as a multiple of the time that it takes to wake.",
        )
        keep: float = Field(
            default=130,
            ge=1,
            allow_inf_nan=False,
            description="Seconds of idle memory that one second of a job's wait for a waking engine is worth.",
        )

    options: Options

    def decide(self, snapshot: ResidencySnapshot) -> ResidencyDecision:
        moves = Moves(snapshot, _worth)
        moves.wake_for_calls()
        waking_s = sum(e.wake_s for e in snapshot.residences if e.state is EngineState.WAKING or moves.wakes(e))
        soon = [engine for engine in snapshot.residences if engine.sleeps and not engine.calls]
        for engine in sorted(soon, key=lambda each: each.next_call_s):
            if engine.next_call_s > self.options.lead * (waking_s + engine.wake_s) or moves.waits():
                break
            if moves.wake(
                engine,
                f"a job will call it in {engine.next_call_s:.1f} s",
                (other for other in snapshot.residences if other.can_leave and _later(other, engine)),
            ):
                waking_s += engine.wake_s
        for engine in snapshot.residences:
            if engine.can_leave and math.isinf(engine.next_call_s):
                unused_s = min(engine.idle_s, engine.awake_s)
                if unused_s >= self._stay_s(engine):
                    moves.sleep(engine, f"no job will call it, and it had no calls for {unused_s:.1f} s")
        return moves.decision

    def _stay_s(self, engine: Residence) -> float:
        """Return how long an engine stays awake that no job will call, in seconds."""
        wait_cost_s = self.options.keep * max(engine.wake_s - engine.lead_s, LEAST_WAIT * engine.wake_s)
        cheapest_s = engine.idle_times.cheapest_stay_s(wait_cost_s)
        return wait_cost_s if cheapest_s is None else (1 + MARGIN) * cheapest_s


def _worth(engine: Residence) -> float:
    """Return what an engine's place is worth: the time of a wake that it saves, by byte and second until then."""
    if engine.calls:
        return math.inf
    return engine.wake_s / max(_next_call_s(engine), 1e-3) / max(engine.awake_bytes, 1)


def _later(other: Residence, engine: Residence) -> bool:
    """Return True if an engine will be called so late that it can sleep until another one has been served."""
    return _next_call_s(other) > engine.next_call_s + engine.wake_s + other.sleep_s + other.wake_s


def _next_call_s(engine: Residence) -> float:
    """Return the expected time until an engine's next call. If no job will call it, earlier idle times tell."""
    if math.isfinite(engine.next_call_s):
        return engine.next_call_s
    median_s = engine.idle_times.quantile(0.5, longer_than_s=engine.idle_s)
    return median_s - engine.idle_s if math.isfinite(median_s) else 3600.0
