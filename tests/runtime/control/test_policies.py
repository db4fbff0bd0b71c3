"""Every policy respects the budget and the engines' bounds, and follows its rule."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.control import catalogue, pauses
from runtime.control.costs import StepCost
from runtime.control.policies.paper import algorithm_1
from runtime.control.policies.turns import _Demand
from runtime.control.policies.waterfill import water_fill
from runtime.control.policy import bound, damp, decision, fit, unchanged, whole_blocks
from runtime.control.snapshot import EngineView, Snapshot
from runtime.errors import ConfigError
from tests.runtime.control.builders import LIMITS, MIB, sizes, snapshot, snapshots, view

ALL = ("static", "round_robin", "paper", "modelclaim", "on_demand", "waterfill", "turns")


def decide(name: str, seen: Snapshot, **options: Any) -> dict[str, float]:
    return sizes(catalogue.make(name, options).decide(seen), seen)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60)
@given(seen=snapshots())
def test_decision_is_within_budget_and_bounds_and_has_reasons(name: str, seen: Snapshot) -> None:
    decision = catalogue.make(name).decide(seen)
    assert set(decision.grants) == set(decision.reasons) == set(seen.engines)
    held = 0
    for engine, grant in decision.grants.items():
        assert seen.engines[engine].limits.violation(grant) is None
        assert decision.reasons[engine]
        held += seen.engines[engine].limits.held_bytes(grant.gpu_memory_utilization)
    assert held <= seen.budget_bytes


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60)
@given(seen=snapshots())
def test_new_grants_are_whole_blocks(name: str, seen: Snapshot) -> None:
    decision = catalogue.make(name).decide(seen)
    for engine, grant in decision.grants.items():
        limits = seen.engines[engine].limits
        size = limits.kv_cache_bytes(grant.gpu_memory_utilization)
        if limits.block_bytes and grant != seen.engines[engine].grant:
            assert size % limits.block_bytes == 0 or size == limits.kv_floor_bytes


def test_decision_rounds_to_whole_blocks() -> None:
    seen = snapshot(*(view(name, block_bytes=3 * MIB) for name in "ab"))
    assert sizes(decision(seen, [100 * MIB, 99 * MIB], lambda index: "because"), seen) == {"a": 99, "b": 99}


def test_unchanged_shrinks_only_if_the_budget_was_cut() -> None:
    seen = snapshot(view("a", 150.5, block_bytes=MIB), view("b", 149, block_bytes=MIB))
    assert unchanged(seen, "because").grants == {name: v.grant for name, v in seen.engines.items()}
    cut = snapshot(view("a", 190), view("b", 110), movable_mib=160)
    shrunk = unchanged(cut, "because")
    assert sizes(shrunk, cut) == {"a": 100, "b": 60}
    assert shrunk.reasons["a"] == "because; shrunk because the budget was cut"


def test_static_configured_keeps_its_grants_when_the_budget_is_cut() -> None:
    cut = snapshot(view("a", 190), view("b", 110), movable_mib=160)
    assert decide("static", cut, shares="configured") == {"a": 190, "b": 110}


@pytest.mark.parametrize("name", ALL)
def test_same_snapshot_gives_the_same_decision(name: str) -> None:
    seen = snapshot(view("a", in_flight=9, arrivals_per_s=3), view("b", soon=2.5, arrivals_per_s=1))
    policy = catalogue.make(name)
    assert policy.decide(seen).grants == policy.decide(seen).grants


def test_static_divides_equally_or_by_weight_or_as_configured() -> None:
    seen = snapshot(view("a", 200), view("b", 100, in_flight=50))
    assert decide("static", seen) == {"a": 150, "b": 150}
    assert decide("static", seen, shares={"a": 3}) == {"a": 225, "b": 75}
    assert decide("static", seen, shares="configured") == {"a": 200, "b": 100}


def test_round_robin_gives_all_movable_memory_to_one_engine_per_turn() -> None:
    views = [view("a"), view("b"), view("c")]
    at = {now_s: decide("round_robin", snapshot(*views, now_s=now_s), turn_s=2) for now_s in (0, 1.9, 2, 4, 6)}
    assert at[0] == at[1.9] == at[6] == {"a": 280, "b": 10, "c": 10}
    assert at[2] == {"a": 10, "b": 280, "c": 10}
    assert at[4] == {"a": 10, "b": 10, "c": 280}


def test_algorithm_1_gives_the_shares_in_the_paper() -> None:
    shares = algorithm_1([80, 40, 45, 25], [0.10, 0.30, 0.25, 0.35], [1, 2, 2, 1])
    assert [round(share, 4) for share in shares] == [0.2385, 0.2538, 0.2115, 0.2961]
    assert algorithm_1([0, 0], [0.1, 0.2], [1, 1]) == [0, 0]
    assert algorithm_1([1, 1], [0.1, 0.1], [1, 2]) == pytest.approx([2 / 3, 1 / 3])
    assert sum(algorithm_1([1, 9], [0.9, 0.9], [1, 1])) == pytest.approx(1)


def test_paper_uses_arrivals_minimum_shares_and_priorities() -> None:
    seen = snapshot(
        view("a", arrivals_per_s=30, minimum_share=0.1), view("b", arrivals_per_s=30, minimum_share=0.1, priority=2)
    )
    assert decide("paper", seen) == {"a": 200, "b": 100}
    assert decide("paper", snapshot(view("a"), view("b"))) == {"a": 10, "b": 10}


def idle(name: str, kv_mib: float = 100, used_mib: float = 0) -> EngineView:
    """Return an engine without requests."""
    return replace(view(name, kv_mib), kv_used_bytes=int(used_mib * MIB))


# The sizes in the modelclaim tests were computed by hand from AIBrix's rule: computePoolKVTargets in pool_policy.go at
# commit e3e10f9.


def test_modelclaim_gives_the_remainder_only_to_active_engines() -> None:
    busy = view("a", 100, in_flight=100, completions_per_s=50)
    assert decide("modelclaim", snapshot(busy, idle("b"), idle("c"))) == {"a": 280, "b": 10, "c": 10}
    # An idle engine keeps what it uses if that is more than its floor.
    assert decide("modelclaim", snapshot(busy, idle("b", used_mib=40))) == {"a": 260, "b": 40}


def test_modelclaim_weights_active_engines_by_capped_integer_counts() -> None:
    many = view("a", 100, in_flight=100, completions_per_s=50)
    few = view("b", 100, in_flight=1, completions_per_s=1.6)
    # Each uses 50 MiB. The other 200 MiB are divided by the weights 1 + 4 + 4 and 1 + 1 + 2.
    assert decide("modelclaim", snapshot(many, few)) == {"a": 188.5, "b": 111.5}


def test_modelclaim_treats_an_engine_with_recent_completions_as_active() -> None:
    finished = view("a", 100, completions_per_s=2)
    assert decide("modelclaim", snapshot(finished, idle("b"))) == {"a": 290, "b": 10}
    long_ago = view("a", 100, completions_per_s=0.2)
    assert decide("modelclaim", snapshot(long_ago, idle("b"))) == {"a": 100, "b": 100}


def test_modelclaim_changes_nothing_while_no_engine_is_active() -> None:
    seen = snapshot(idle("a", 180.5), idle("b", 30))
    decision = catalogue.make("modelclaim").decide(seen)
    assert decision.grants == {name: view.grant for name, view in seen.engines.items()}
    assert dict(decision.reasons) == {"a": "no engine is active", "b": "no engine is active"}


def test_on_demand_serves_the_longest_wait_and_takes_no_memory_in_use() -> None:
    waits = view("a", 100, in_flight=64, running=40, oldest_wait_s=1)
    waits_longer = view("b", 100, in_flight=300, running=50, oldest_wait_s=2)
    assert decide("on_demand", snapshot(waits, waits_longer, movable_mib=160)) == {"a": 50, "b": 110}


def test_waterfill_shares_scarce_memory_equally_and_spreads_what_is_left() -> None:
    views = view("a", in_flight=4, soon=5), view("b", in_flight=50), view("c", in_flight=90)
    assert decide("waterfill", snapshot(*views, movable_mib=70), damping=0) == {"a": 10, "b": 30, "c": 30}
    # The engines can use 10, 51 and 64 MiB now, the first expects 5 MiB more, and the other 70 MiB are spread evenly.
    assert decide("waterfill", snapshot(*views, movable_mib=200), damping=0) == {"a": 38.3, "b": 74.3, "c": 87.3}


def test_waterfill_reasons_state_what_engines_can_use_and_get() -> None:
    seen = snapshot(view("a", in_flight=4, soon=5), view("b", in_flight=50), view("c", in_flight=90), movable_mib=70)
    reasons = catalogue.make("waterfill").decide(seen).reasons
    assert reasons["a"] == "4 in flight: all 10.0 MiB it can use; 5.0 expected next: 0.0 MiB more"
    assert reasons["b"] == "50 in flight: 30.0 MiB of the 51.0 MiB it can use; 0.0 expected next: 0.0 MiB more"


def test_waterfill_favours_urgent_engines() -> None:
    seen = snapshot(view("a", in_flight=60), view("b", in_flight=60, priority=2), movable_mib=60)
    assert decide("waterfill", seen, damping=0) == {"a": 40, "b": 20}


def test_waterfill_makes_no_small_changes() -> None:
    seen = snapshot(view("a", 148, in_flight=60), view("b", 152, in_flight=60))
    assert decide("waterfill", seen) == {"a": 148, "b": 152}
    assert decide("waterfill", seen, damping=0) == {"a": 150, "b": 150}


A_GPU = StepCost(0.010, 0.0001, 0, confidence=0.9)
"""A step mostly reads the weights, so that large batches pay."""
A_CPU = StepCost(0.0028, 0.00014, 0)


def admitted(seen: Snapshot, **options: Any) -> set[str]:
    grants = catalogue.make("turns", options).decide(seen).grants
    assert {grant.max_active_seqs for grant in grants.values()} <= {0, LIMITS.seqs_ceiling}
    return {name for name, grant in grants.items() if grant.max_active_seqs}


def team(cost: StepCost = A_GPU, lanes: float = 1, **in_flight: int) -> Snapshot:
    """Return engines that each need more sequences than fit, of 1 MiB in 60 MiB."""
    views = [view(name, 20, in_flight=count, cost=cost) for name, count in in_flight.items()]
    return replace(snapshot(*views, movable_mib=60), lanes=lanes)


def test_turns_admits_the_longest_queue_alone_where_large_batches_pay() -> None:
    seen = team(a=50, b=90, c=60)
    assert admitted(seen) == {"b"}
    decided = catalogue.make("turns").decide(seen)
    assert decided.reasons["b"] == "90 in flight: served in the turn of b"
    assert decided.reasons["a"] == "50 in flight: paused in the turn of b"
    assert sizes(decided, seen)["b"] == 40  # the others run what they have, in 10 MiB each


def test_turns_is_waterfill_where_engines_do_not_slow_each_other_down() -> None:
    seen = team(A_CPU, lanes=3, a=50, b=90, c=60)
    assert admitted(seen) == {"a", "b", "c"}
    assert decide("turns", seen) == decide("waterfill", seen)


def test_turns_is_waterfill_while_memory_is_enough() -> None:
    seen = team(a=5, b=9, c=6)
    assert catalogue.make("turns").decide(seen).grants == catalogue.make("waterfill").decide(seen).grants


def serving(seen: Snapshot, names: str) -> Snapshot:
    """Return the snapshot with all other engines paused."""
    views = {
        name: v if name in names else replace(v, grant=replace(v.grant, max_active_seqs=0))
        for name, v in seen.engines.items()
    }
    return replace(seen, engines=views)


def test_turns_stays_with_its_engine_until_another_is_clearly_better() -> None:
    assert admitted(serving(team(a=85, b=90, c=20), "a")) == {"a"}
    assert admitted(serving(team(a=40, b=90, c=20), "a")) == {"b"}
    assert admitted(serving(team(a=0, b=90, c=60), "a")) == {"b"}  # nothing left to serve


def test_turns_prefers_urgent_engines() -> None:
    seen = team(a=50, b=80, c=20)
    urgent = {name: replace(v, priority=1 if name == "a" else 3) for name, v in seen.engines.items()}
    assert admitted(seen) == {"b"}
    assert admitted(replace(seen, engines=urgent)) == {"a"}


def changed(seen: Snapshot, name: str, **changes: Any) -> Snapshot:
    """Return the snapshot with one engine's view changed."""
    return replace(seen, engines={**seen.engines, name: replace(seen.engines[name], **changes)})


@pytest.mark.parametrize("objective", ["jct_slo_s", "slo_s", "ttft_slo_s"])
def test_turns_serves_an_engine_earlier_while_a_request_waits_for_its_objective(objective: str) -> None:
    seen = team(a=30, b=90, c=20)
    waits = changed(seen, "a", oldest_wait_s=4.0, oldest_job_s=4.0)
    assert admitted(waits) == {"b"}
    assert admitted(changed(waits, "a", **{objective: 5.0})) == {"a"}
    assert admitted(changed(waits, "a", **{objective: 500.0})) == {"b"}


def test_an_objective_leaves_time_for_the_reply() -> None:
    """A reply takes 10 s. Of 25 s for the call, 15 s are left to wait; of 8 s, half counts."""
    seen = changed(team(a=40, b=90, c=20), "a", reply_tokens=1000, oldest_wait_s=9)
    assert admitted(changed(seen, "a", slo_s=100.0)) == {"b"}
    assert admitted(changed(seen, "a", slo_s=25.0)) == {"a"}
    assert admitted(changed(seen, "a", slo_s=8.0)) == {"a"}
    assert admitted(changed(seen, "a", slo_s=8.0, oldest_wait_s=0.5)) == {"b"}
    assert admitted(changed(seen, "a", ttft_slo_s=25.0)) == {"b"}  # a first token needs no reply


def test_turns_counts_no_more_sequences_than_an_engine_may_run() -> None:
    """The floor of engine b holds all 64 requests in its queue, but it runs only 4 of them at once."""
    seen = changed(changed(team(a=40, b=64), "a", sequence_bytes=2 * MIB), "b", sequence_bytes=10 * MIB / 64)
    assert admitted(seen) == {"b"}
    few = changed(seen, "b", limits=replace(LIMITS, seqs_ceiling=4))
    assert {n for n, g in catalogue.make("turns").decide(few).grants.items() if g.max_active_seqs} == {"a"}


def test_turns_limits_concurrency_to_the_objective_for_the_time_between_tokens() -> None:
    """A step of 40 sequences takes 14 ms. 12 ms are enough for 20, and 5 ms for none, so that nothing is gained."""
    seen = team(replace(A_GPU, prompt_token_s=0.00001), a=50, b=90, c=60)
    for objective_s, sequences in ((0.020, LIMITS.seqs_ceiling), (0.012, 20), (0.005, LIMITS.seqs_ceiling)):
        grant = catalogue.make("turns").decide(changed(seen, "b", tpot_slo_s=objective_s)).grants["b"]
        assert grant.max_active_seqs == sequences
        assert grant.max_step_tokens >= 256  # a prompt is not cut to pieces
    unmeasured = changed(seen, "b", tpot_slo_s=0.012, cost=replace(A_GPU, confidence=0.2))
    assert catalogue.make("turns").decide(unmeasured).grants["b"].max_active_seqs == LIMITS.seqs_ceiling


def test_turns_limits_step_tokens_so_that_prompts_keep_the_objective_of_any_engine() -> None:
    """A round has 20 ms: 2 engines take 12 ms for 10 sequences each, and 8 ms are left for prompts of 10 µs a token."""
    cost = StepCost(0.005, 0.0001, 0.00001, confidence=0.9)
    seen = team(cost, a=10, b=10)
    assert {g.max_step_tokens for g in catalogue.make("turns").decide(seen).grants.values()} == {2048}
    decided = catalogue.make("turns").decide(changed(seen, "a", tpot_slo_s=0.020))
    assert {g.max_step_tokens for g in decided.grants.values()} == {64 + 512}  # 800, rounded down, and all sequences
    assert {g.max_active_seqs for g in decided.grants.values()} == {LIMITS.seqs_ceiling}


def test_turns_keeps_objectives_per_token_beside_engines_whose_turn_has_ended() -> None:
    """A round has 24 ms: 10 for the step of b, 10.5 for that of a, which still runs 5, and 3.5 ms for 35 sequences."""
    seen = changed(team(a=5, b=90), "b", tpot_slo_s=0.024)
    assert decided_sequences(changed(seen, "a", running=0)) == LIMITS.seqs_ceiling
    assert decided_sequences(changed(seen, "a", running=5)) == 35
    without_time = changed(changed(seen, "a", running=5), "b", tpot_slo_s=0.01305)
    assert decided_sequences(without_time) == 30  # as if the other engine had drained


def decided_sequences(seen: Snapshot) -> int:
    return catalogue.make("turns").decide(seen).grants["b"].max_active_seqs


def test_prompts_count_in_the_objective_for_the_time_between_tokens() -> None:
    """3 ms are left beside the step. A sequence takes 0.1 ms, and 0.1 ms more if 10 prompt tokens come with it."""
    seen = changed(team(a=5, b=90), "b", tpot_slo_s=0.01305, cost=replace(A_GPU, prompt_token_s=0.00001))
    assert decided_sequences(seen) == 30
    assert decided_sequences(changed(seen, "b", prompt_ratio=10)) == 15


def test_objectives_per_token_are_kept_before_an_engine_has_computed_alone() -> None:
    seen = changed(team(a=5, b=90), "b", tpot_slo_s=0.01305, cost=replace(A_GPU, confidence=0.3))
    assert decided_sequences(seen) == 30


def test_turns_gives_no_fewer_step_tokens_than_an_engine_takes() -> None:
    """Without chunked prefill, a step must hold a whole prompt."""
    seen = changed(team(replace(A_GPU, prompt_token_s=0.001), a=5, b=90), "b", tpot_slo_s=0.013)
    assert catalogue.make("turns").decide(seen).grants["b"].max_step_tokens < 1500
    whole = changed(seen, "b", limits=replace(LIMITS, step_tokens_floor=1500))
    assert catalogue.make("turns").decide(whole).grants["b"].max_step_tokens == 1500


def test_prompts_that_cost_almost_nothing_have_all_step_tokens() -> None:
    seen = changed(team(StepCost(0.005, 0.0001, 5e-324, confidence=0.9), a=10, b=10), "a", tpot_slo_s=0.020)
    assert {g.max_step_tokens for g in catalogue.make("turns").decide(seen).grants.values()} == {2048}


def test_turns_keeps_minimum_shares_in_every_turn() -> None:
    seen = team(a=50, b=90, c=60)
    assert decide("turns", seen)["c"] == 10
    kept = decide("turns", changed(seen, "c", minimum_share=0.5))  # of 30 MiB above the floors
    assert (kept["c"], kept["b"]) == (25, 25)
    everyone = {name: replace(v, minimum_share=0.9) for name, v in seen.engines.items()}
    assert decide("turns", replace(seen, engines=everyone)) == {"a": 20, "b": 20, "c": 20}  # 0.9 each do not fit


def test_long_prompts_count_in_the_cost_of_a_turn() -> None:
    """If most of the time goes to prompts, a larger batch saves little, and turns do not pay."""
    seen = team(replace(A_GPU, prompt_token_s=0.0001), a=80, b=90, c=85)
    prompts = {name: replace(v, prompt_ratio=50) for name, v in seen.engines.items()}
    assert len(admitted(seen)) == 1
    assert len(admitted(replace(seen, engines=prompts))) == 3


def preempted(seen: Snapshot) -> set[str]:
    decided = catalogue.make("turns").decide(seen)
    assert all(grant.max_active_seqs == 0 for grant in decided.grants.values() if grant.preempt)
    return {name for name, grant in decided.grants.items() if grant.preempt}


def end_of_turn(others_reply_tokens: float = 100, running: int = 10, prompt_token_s: float = 0.0001) -> Snapshot:
    """Return a snapshot in which the turn of engine a ends, and that of b with its 90 requests begins.

    Engine a runs requests that hold 1,000 tokens together. Its replies have 50 tokens: 500 ms if rounds pay for all.
    """
    seen = replace(team(a=10, b=90), lanes_confidence=0.95)
    cost = replace(A_GPU, prompt_token_s=prompt_token_s)
    limits = replace(LIMITS, block_bytes=MIB, block_tokens=100)
    seen = changed(seen, "a", cost=cost, limits=limits, running=running, reply_tokens=50, kv_used_bytes=10 * MIB)
    return changed(seen, "b", reply_tokens=others_reply_tokens)


def test_turns_preempts_at_the_end_of_a_turn_where_computing_again_is_cheap() -> None:
    """Engine b serves its queue in 150 rounds and 2.4 s, 27 ms a request, and 46 rounds of these in a turn.

    Finishing costs 420 ms. Computing again takes 100 or 300 ms, and the wait counts 270 ms.
    """
    assert admitted(end_of_turn()) == {"b"}
    assert preempted(end_of_turn()) == {"a"}
    assert preempted(end_of_turn(prompt_token_s=0.0003)) == set()
    assert preempted(replace(end_of_turn(), lanes_confidence=0.5)) == set()  # the lanes are measured first
    assert preempted(changed(end_of_turn(), "a", tpot_slo_s=1.0)) == set()
    assert preempted(changed(end_of_turn(), "a", unanswered_s=pauses.MOST_S + 1)) == set()


def test_turns_does_not_preempt_requests_that_would_wait_for_fewer() -> None:
    """The wait of 20 requests counts 530 ms."""
    assert preempted(end_of_turn(running=20)) == set()


def test_turns_does_not_preempt_requests_whose_next_turn_comes_before_they_would_have_finished() -> None:
    """Engine b serves its queue in 45 rounds, and 14 of these in a turn. Until then, finishing costs 38 ms."""
    assert preempted(end_of_turn(others_reply_tokens=30)) == set()


def test_turns_compares_many_engines_in_linear_time() -> None:
    """A thousand queues: the sets that are compared have few thousand engines together."""
    seen = snapshot(*(view(f"e{number}", 20, in_flight=20 + number % 50) for number in range(1000)))
    demand = _Demand(seen, [float(20 << 20)] * 1000, turn=0.3)
    compared = list(demand.candidates())
    assert sum(map(len, compared)) < 4 * 1000
    assert len(compared[0]) == 1


def test_an_engine_whose_step_never_ends_gets_no_turn() -> None:
    seen = team(a=50, b=200, c=60)
    stuck = {name: replace(v, stalled_s=5.0 if name == "b" else 0.0) for name, v in seen.engines.items()}
    assert admitted(replace(seen, engines=stuck)) == {"c"}


def test_a_paused_engine_is_not_taken_for_one_whose_step_never_ends() -> None:
    """After a preemption it may still report requests as running, and makes no steps because it is paused."""
    seen = serving(team(a=50, b=200, c=60), "a")
    assert admitted(changed(seen, "b", stalled_s=5.0, running=3)) == {"b"}


@pytest.mark.parametrize(("reply_tokens", "kept_mib"), [(0, 14), (16, 20), (500, 26)])
def test_draining_engines_keep_room_for_their_requests_to_grow(reply_tokens: float, kept_mib: float) -> None:
    limits = replace(LIMITS, block_bytes=MIB, block_tokens=16)
    drains: dict[str, Any] = {"running": 12, "kv_used_bytes": 14 * MIB, "reply_tokens": reply_tokens}
    seen = changed(team(a=30, b=90), "a", limits=limits, **drains)
    decided = catalogue.make("turns").decide(seen)
    assert decided.grants["a"].max_active_seqs == 0
    assert sizes(decided, seen)["a"] == kept_mib


@given(seen=snapshots())
def test_turns_never_pauses_all_engines_with_requests(seen: Snapshot) -> None:
    assert not pauses.starves(seen, catalogue.make("turns").decide(seen).grants)


def test_water_fill_gives_the_others_what_a_cap_cuts_off() -> None:
    assert water_fill(100, [1, 1, 1], [10, 1000, 20]) == [10, 70, 20]
    assert water_fill(100, [1, 3], [1000, 1000]) == [25, 75]
    assert water_fill(100, [1, 1], [5, 5]) == [5, 5]
    assert water_fill(0, [0], [5]) == [0]


@settings(max_examples=200)
@given(
    total=st.floats(0, 1e6),
    engines=st.lists(st.tuples(st.floats(0.01, 100), st.floats(0, 1e5)), min_size=1, max_size=12),
)
def test_water_fill_uses_everything_up_to_the_caps(total: float, engines: list[tuple[float, float]]) -> None:
    weights, caps = [weight for weight, _ in engines], [cap for _, cap in engines]
    filled = water_fill(total, weights, caps)
    assert all(size <= cap for size, cap in zip(filled, caps, strict=True))
    assert sum(filled) == pytest.approx(min(total, sum(caps)), rel=1e-6, abs=1e-6)
    levels = [size / weight for size, weight, cap in zip(filled, weights, caps, strict=True) if size < cap]
    assert not levels or max(levels) == pytest.approx(min(levels))


def test_bound_damp_and_fit() -> None:
    seen = snapshot(view("a", 100), view("b", 100), movable_mib=100)
    assert bound(seen, [0, 1e12]) == [LIMITS.kv_floor_bytes, LIMITS.kv_ceiling_bytes]
    assert damp(seen, [104 * MIB, 90 * MIB], 0.05) == [100 * MIB, 90 * MIB]
    assert damp(snapshot(view("a", 9.9)), [10 * MIB], 0.05) == [10 * MIB]
    assert fit(seen, [10 * MIB, 40 * MIB]) == [10 * MIB, 40 * MIB]
    assert fit(seen, [10 * MIB, 990 * MIB]) == [10 * MIB, 90 * MIB]
    assert fit(snapshot(view("a"), movable_mib=0), [50 * MIB]) == [10 * MIB]


def test_turns_stays_within_the_budget_while_an_engine_is_just_below_its_minimum_share() -> None:
    """Hypothesis found 0.5 MiB too much: damping kept the engine below its floor, and whole blocks raised it again."""
    seen = snapshot(
        view("a", 10, sequence_bytes=10.5 * MIB),
        view("b", 489, minimum_share=1, block_bytes=1),
        view("c", 10, minimum_share=0.5),
        view("d", 10),
        view("e", 10),
        movable_mib=804,
    )
    assert sum(decide("turns", seen).values()) <= 804


def test_bound_passes_nan_on() -> None:
    """A ceiling in place of NaN would hide the fault of a third-party policy."""
    assert math.isnan(bound(snapshot(view("a")), [math.nan])[0])


def test_whole_blocks_carries_remainders_and_keeps_floors_and_ceilings() -> None:
    seen = snapshot(*(view(name, block_bytes=4 * MIB) for name in "abc"), view("d"), movable_mib=400)

    def rounded(*sizes_mib: int) -> list[float]:
        return [size / MIB for size in whole_blocks(seen, [size * MIB for size in sizes_mib])]

    assert rounded(99, 99, 99, 103) == [96, 100, 100, 103]  # 3, 2 and 1 MiB are carried; d has no blocks
    assert rounded(10, 899, 900, 10) == [10, 896, 900, 10]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("waterfil", {}, "did you mean waterfill"),
        ("round_robin", {"turn_s": 0}, "control.policy.turn_s"),
        ("round_robin", {"turns": 1}, "known keys are name, turn_s"),
        ("static", {"shares": "fair"}, "control.policy.shares"),
    ],
)
def test_invalid_choice_names_the_key(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        catalogue.make(name, options)
