"""Snapshots for tests of policies."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from runtime.control.snapshot import EngineView, Snapshot
from runtime.engines.grant import EngineLimits, Grant

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


def view(name: str, kv_mib: float = 100, block_bytes: int = 0, **changes: Any) -> EngineView:
    """An engine that holds so much KV cache; a sequence takes 1 MiB."""
    kv = int(kv_mib * MIB)
    grant = Grant(LIMITS.share(kv), LIMITS.seqs_ceiling, LIMITS.step_tokens_ceiling)
    return EngineView(
        name,
        replace(LIMITS, block_bytes=block_bytes),
        grant,
        kv,
        kv // 2,
        **{"sequence_bytes": MIB, "peak_in_flight": changes.get("in_flight", 0), **changes},
    )


def snapshot(*views: EngineView, movable_mib: float = 300, now_s: float = 0) -> Snapshot:
    """Engines that share so much KV cache."""
    fixed = sum(v.limits.fixed_bytes for v in views)
    return Snapshot(now_s, fixed + int(movable_mib * MIB), {v.name: v for v in views})


def sizes(found: Any, given: Snapshot) -> dict[str, float]:
    """What a decision gives each engine: MiB of KV cache."""
    return {
        name: round(given.engines[name].limits.kv_cache_bytes(grant.gpu_memory_utilization) / MIB, 1)
        for name, grant in found.grants.items()
    }


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Any number of engines in any state, and a budget that holds their floors at least."""
    count = draw(st.integers(1, 6))
    views = [
        view(
            f"e{number}",
            draw(st.floats(10, 900)),
            draw(st.sampled_from([0, 1, MIB // 3, 20 * MIB])),
            in_flight=draw(st.integers(0, 300)),
            running=draw(st.integers(0, 64)),
            soon=draw(st.floats(0, 100)),
            coming=draw(st.floats(0, 1000)),
            arrivals_per_s=draw(st.floats(0, 1e4)),
            completions_per_s=draw(st.floats(0, 1e4)),
            oldest_wait_s=draw(st.floats(0, 100)),
            sequence_bytes=draw(st.floats(1, 50 * MIB)),
            priority=draw(st.integers(1, 5)),
            minimum_share=draw(st.none() | st.floats(0, 1)),
        )
        for number in range(count)
    ]
    return snapshot(*views, movable_mib=draw(st.floats(count * 10 + 1, 2000)), now_s=draw(st.floats(0, 1e6)))
