"""Plans of memory moves: who shrinks, who grows by how much now, and who waits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.grant import EngineLimits, Grant
from runtime.engines.memory_plan import STEP_BYTES, Plan, Position, plan, plan_growth

MIB = 1 << 20
DEVICE = 1000 * MIB
LIMITS = EngineLimits(
    device_bytes=DEVICE,
    fixed_bytes=100 * MIB,
    kv_floor_bytes=50 * MIB,
    kv_ceiling_bytes=900 * MIB,
    seqs_ceiling=64,
    step_tokens_floor=1,
    step_tokens_ceiling=2048,
)


def grant(share: float) -> Grant:
    return Grant(share, 64, 2048)


def position(claimed_mib: int, settled_mib: int | None = None, unavailable: str | None = None) -> Position:
    settled_mib = claimed_mib if settled_mib is None else settled_mib
    return Position(LIMITS, claimed_mib * MIB, settled_mib * MIB, unavailable)


FULL = {"a": position(300), "b": position(400), "c": position(300)}


def test_smaller_grants_shrink_and_all_others_grow() -> None:
    grants = {"a": grant(0.5), "b": grant(0.2), "c": Grant(0.3, 1, 16)}
    assert plan(FULL, grants, DEVICE) == Plan(shrink={"b": grants["b"]}, grow={"a": grants["a"], "c": grants["c"]})


def test_one_impossible_grant_rejects_the_whole_decision() -> None:
    rejected = plan(FULL, {"a": grant(0.1), "b": grant(0.2), "d": grant(0.2)}, DEVICE).rejected
    assert rejected == {
        "a": "gpu_memory_utilization 0.1 is below the engine's floor of 0.1500",
        "b": "another grant of the decision was rejected",
        "d": "there is no engine 'd'; there are a, b, c",
    }


def test_an_engine_that_cannot_be_resized_rejects_the_decision() -> None:
    positions = FULL | {"b": position(400, unavailable="engine b is starting")}
    assert plan(positions, {"b": grant(0.2)}, DEVICE).rejected == {"b": "engine b is starting"}


def test_growth_beyond_the_budget_is_rejected() -> None:
    rejected = plan(FULL, {"a": grant(0.6), "b": grant(0.2)}, DEVICE).rejected
    reason = f"the engines would hold {1100 * MIB} bytes; the budget is {DEVICE}"
    assert rejected == {"a": reason, "b": reason}


def test_memory_that_a_donor_has_yet_to_release_can_be_granted() -> None:
    positions = FULL | {"b": position(400, settled_mib=200)}
    assert plan(positions, {"a": grant(0.5)}, DEVICE) == Plan(grow={"a": grant(0.5)})


def test_memory_that_a_recipient_waits_for_cannot_be_granted_again() -> None:
    positions = {"a": position(300, settled_mib=500), "b": position(400, settled_mib=200), "c": position(300)}
    assert "the budget is" in plan(positions, {"c": grant(0.4)}, DEVICE).rejected["c"]


def test_shrinking_is_possible_after_the_budget_was_cut() -> None:
    assert plan(FULL, {"a": grant(0.2)}, DEVICE // 2) == Plan(shrink={"a": grant(0.2)})
    assert plan(FULL, {"a": grant(0.31)}, DEVICE // 2).rejected


def test_recipients_get_free_memory_in_the_order_of_the_grants() -> None:
    grants = {"a": grant(0.5), "b": grant(0.6), "c": grant(0.4)}
    claims = {"a": 300 * MIB, "b": 400 * MIB, "c": 300 * MIB}
    growths = plan_growth(grants, dict.fromkeys("abc", LIMITS), claims, 250 * MIB)
    assert growths["a"].now == grants["a"]
    assert growths["b"].now == grant(0.45)
    assert growths["c"].now is None
    assert [growths[name].complete for name in "abc"] == [True, False, False]
    assert [growths[name].missing_bytes for name in "bc"] == [150 * MIB, 100 * MIB]


def test_a_recipient_does_not_grow_by_less_than_a_step() -> None:
    def grown(free_bytes: int) -> Grant | None:
        return plan_growth({"a": grant(0.5)}, {"a": LIMITS}, {"a": 300 * MIB}, free_bytes)["a"].now

    assert grown(STEP_BYTES - 1) is None
    assert grown(STEP_BYTES) == grant(0.301)


def test_a_grant_that_only_changes_concurrency_needs_no_free_memory() -> None:
    growth = plan_growth({"a": Grant(0.3, 1, 16)}, {"a": LIMITS}, {"a": 300 * MIB}, -5)["a"]
    assert growth.now == Grant(0.3, 1, 16)
    assert growth.complete


SIZES = st.integers(150, 1000)


@given(
    held=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=6),
    free_mib=st.integers(-100, 1000),
    step=SIZES | st.just(1),
)
def test_growth_stays_within_the_free_memory_and_the_grants(
    held: list[tuple[int, int]], free_mib: int, step: int
) -> None:
    claims = {str(number): min(sizes) * MIB for number, sizes in enumerate(held)}
    grants = {str(number): grant(max(sizes) / 1000) for number, sizes in enumerate(held)}
    growths = plan_growth(grants, dict.fromkeys(grants, LIMITS), claims, free_mib * MIB, step * MIB)
    grown_bytes = 0
    for name, growth in growths.items():
        target_bytes = LIMITS.held_bytes(grants[name].gpu_memory_utilization)
        now_bytes = LIMITS.held_bytes(growth.now.gpu_memory_utilization) if growth.now else claims[name]
        assert claims[name] <= now_bytes <= target_bytes
        assert growth.complete == (now_bytes == target_bytes and growth.now is not None)
        if not growth.complete and growth.now:
            assert now_bytes - claims[name] >= step * MIB
        grown_bytes += now_bytes - claims[name]
    assert grown_bytes <= max(free_mib, 0) * MIB


@given(
    claimed=st.lists(SIZES, min_size=1, max_size=6),
    shares=st.lists(st.integers(-1, 11).map(lambda n: n / 10) | st.just(math.nan), max_size=6),
    budget_mib=st.integers(0, 3000),
)
def test_a_plan_that_grows_engines_fits_the_budget_once_it_has_settled(
    claimed: list[int], shares: list[float], budget_mib: int
) -> None:
    positions = {str(number): position(size) for number, size in enumerate(claimed)}
    grants = {str(number): grant(share) for number, share in enumerate(shares)}
    found = plan(positions, grants, budget_mib * MIB)
    assert sorted([*found.rejected, *found.shrink, *found.grow]) == sorted(grants)
    if found.rejected:
        assert set(found.rejected) == set(grants)
        return
    settled_bytes = {name: at.claimed_bytes for name, at in positions.items()}
    for name, granted in {**found.shrink, **found.grow}.items():
        settled_bytes[name] = LIMITS.held_bytes(granted.gpu_memory_utilization)
    assert all(settled_bytes[name] < positions[name].claimed_bytes for name in found.shrink)
    assert all(settled_bytes[name] >= positions[name].claimed_bytes for name in found.grow)
    if any(settled_bytes[name] > positions[name].claimed_bytes for name in found.grow):
        assert sum(settled_bytes.values()) <= budget_mib * MIB


@pytest.mark.parametrize("budget_bytes", [0, DEVICE])
def test_an_empty_decision_is_an_empty_plan(budget_bytes: int) -> None:
    assert plan(FULL, {}, budget_bytes) == Plan()
