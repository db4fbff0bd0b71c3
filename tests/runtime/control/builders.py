"""Builders of snapshots, and of records of the decision log, for tests."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from runtime.control import catalogue
from runtime.control.costs import StepCost
from runtime.control.decision_log import Outcome, Record
from runtime.control.policy import Decision
from runtime.control.snapshot import EngineView, Snapshot
from runtime.engines.grant import Applied, EngineLimits, Grant, Rejected

MIB = 1 << 20
LIMITS = EngineLimits(
    device_bytes=1000 * MIB,
    fixed_bytes=100 * MIB,
    kv_floor_bytes=10 * MIB,
    kv_ceiling_bytes=900 * MIB,
    seqs_ceiling=64,
    step_tokens_floor=1,
    step_tokens_ceiling=2048,
)


def view(
    name: str,
    kv_mib: float = 100,
    block_bytes: int = 0,
    paused: bool = False,
    step_tokens_floor: int = 1,
    **changes: Any,
) -> EngineView:
    """Return an engine with a KV cache of `kv_mib`, half of it in use; a sequence takes 1 MiB."""
    kv = int(kv_mib * MIB)
    grant = Grant(LIMITS.share(kv), 0 if paused else LIMITS.seqs_ceiling, LIMITS.step_tokens_ceiling)
    return EngineView(
        name,
        replace(
            LIMITS,
            block_bytes=block_bytes,
            block_tokens=16 if block_bytes else 0,
            step_tokens_floor=step_tokens_floor,
        ),
        grant,
        kv,
        kv // 2,
        **{"sequence_bytes": MIB, "peak_in_flight": changes.get("in_flight", 0), **changes},
    )


def snapshot(*views: EngineView, movable_mib: float = 300, now_s: float = 0) -> Snapshot:
    """Return a snapshot of engines that share `movable_mib` of KV cache."""
    fixed = sum(v.limits.fixed_bytes for v in views)
    return Snapshot(now_s, fixed + int(movable_mib * MIB), {v.name: v for v in views})


def sizes(decision: Decision, snapshot: Snapshot) -> dict[str, float]:
    """Return the MiB of KV cache that a decision grants to each engine."""
    return {
        name: round(snapshot.engines[name].limits.kv_cache_bytes(grant.gpu_memory_utilization) / MIB, 1)
        for name, grant in decision.grants.items()
    }


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Draw one to six engines in any state, and a budget that holds at least their floors."""
    count = draw(st.integers(1, 6))
    views = [
        view(
            f"e{number}",
            draw(st.floats(10, 900)),
            draw(st.sampled_from([0, 1, MIB // 3, 20 * MIB])),
            step_tokens_floor=draw(st.sampled_from([1, 1500])),
            in_flight=draw(st.integers(0, 300)),
            running=draw(st.integers(0, 64)),
            soon=draw(st.floats(0, 100)),
            coming=draw(st.floats(0, 1000)),
            arrivals_per_s=draw(st.floats(0, 1e4)),
            completions_per_s=draw(st.floats(0, 1e4)),
            oldest_wait_s=draw(st.floats(0, 100)),
            oldest_job_s=draw(st.floats(0, 1000)),
            unanswered_s=draw(st.sampled_from([0, 100])),
            sequence_bytes=draw(st.floats(1, 50 * MIB)),
            priority=draw(st.integers(1, 5)),
            minimum_share=draw(st.none() | st.floats(0, 1)),
            paused=draw(st.booleans()),
            stalled_s=draw(st.sampled_from([0, 10])),
            cost=StepCost(*draw(st.tuples(st.floats(1e-6, 10), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)))),
            prompt_ratio=draw(st.floats(0, 1e4)),
            reply_tokens=draw(st.floats(0, 1e4)),
            jct_slo_s=draw(st.none() | st.floats(1e-3, 1e3)),
            slo_s=draw(st.none() | st.floats(1e-3, 1e3)),
            ttft_slo_s=draw(st.none() | st.floats(1e-3, 1e3)),
            tpot_slo_s=draw(st.none() | st.floats(1e-3, 10)),
        )
        for number in range(count)
    ]
    seen = snapshot(*views, movable_mib=draw(st.floats(count * 10 + 1, 2000)), now_s=draw(st.floats(0, 1e6)))
    return replace(seen, lanes=draw(st.floats(1, count)), lanes_confidence=draw(st.sampled_from([0, 1])))


def record(policy: str = "static", now_s: float = 1.0, in_flight: int = 60) -> Record:
    """Return a record of a policy's decision over two engines; the first has requests in flight."""
    seen = snapshot(view("a", 150, in_flight=in_flight), view("b", 150), now_s=now_s)
    decision = catalogue.make(policy).decide(seen)
    decision = Decision(dict(decision.grants), dict(decision.reasons))
    grant = Grant(0.2, 64, 2048)
    outcomes = {"a": Outcome.of(Applied(grant, 1, 2, 0.5, 0.1, 3)), "b": Outcome.of(Rejected(grant, "no"))}
    return Record(policy, "tick", seen, decision, outcomes=outcomes, seconds=0.01)
