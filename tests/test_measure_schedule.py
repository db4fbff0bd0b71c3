"""scripts/measure_schedule.py finds best schedules, and bounds that no schedule undercuts."""

from typing import Any

import pytest

from runtime.bench.results import CallRow, JobRow
from runtime.simulation.load import EngineModel, Model
from scripts.measure_schedule import BLOCK_BYTES, BLOCK_TOKENS, Burst, Call, Search, least_end_s, play


def engine(step_s: float, token_s: float = 0.0) -> EngineModel:
    return EngineModel(
        step_s=step_s,
        token_s=token_s,
        block_bytes=BLOCK_BYTES,
        block_tokens=BLOCK_TOKENS,
        null_blocks=0,
        max_num_seqs=64,
    )


ENGINES = {"a": engine(0.002, 0.0001), "b": engine(0.005, 0.0002)}
CHAIN = (Call("a", 10), Call("b", 20))


def test_calls_that_fit_run_together() -> None:
    burst = Burst({(Call("a", 10),): 2}, blocks=3)
    assert Search(burst, ENGINES, mean=False).best() == pytest.approx(10 * (0.002 + 2 * 0.0001))


def test_calls_that_do_not_fit_run_one_after_the_other_and_the_shortest_first() -> None:
    burst = Burst({(Call("a", 10),): 1, (Call("a", 30),): 1}, blocks=2)
    step_s = 0.0021
    assert Search(burst, ENGINES, mean=False).best() == pytest.approx(40 * step_s)
    assert Search(burst, ENGINES, mean=True).best() == pytest.approx((10 + 40) * step_s)


def test_an_engine_runs_in_full_batches() -> None:
    burst = Burst({CHAIN: 4}, blocks=5)  # four sequences of one engine
    best_s = 10 * ENGINES["a"].decode_step_s(4) + 20 * ENGINES["b"].decode_step_s(4)
    assert Search(burst, ENGINES, mean=False).best() == pytest.approx(best_s)


@pytest.mark.parametrize("mean", [False, True])
def test_the_estimate_of_the_rest_does_not_change_the_result(mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    burst = Burst({CHAIN: 3, (Call("b", 7), Call("a", 9)): 2}, blocks=4)
    guided = Search(burst, ENGINES, mean).best()
    monkeypatch.setattr(Search, "_least", lambda self, state: 0.0)
    assert Search(burst, ENGINES, mean).best() == pytest.approx(guided)


def test_no_policy_undercuts_the_best_schedule_or_the_bound() -> None:
    burst = Burst({CHAIN: 6}, blocks=4)
    best_s, mean_s = Search(burst, ENGINES, mean=False).best(), Search(burst, ENGINES, mean=True).best() / 6
    played = play(burst, ENGINES, "turns,static", plays=2)
    assert {policy: len(plays) for policy, plays in played.items()} == {"turns": 2, "static": 2}
    for rows in (rows for plays in played.values() for rows in plays):
        assert len(rows) == 6
        assert not any(row.error for row in rows)
        end_s = max(row.jct_s for row in rows)
        assert end_s >= best_s - 1e-6
        assert sum(row.jct_s for row in rows) / 6 >= mean_s - 1e-6
        bound_s = least_end_s(rows, Model(lanes=1, engines=ENGINES), burst.blocks * BLOCK_BYTES)
        assert best_s / 2 < bound_s <= best_s + 1e-6


def job(arrived_s: float, *calls: tuple[str, int]) -> JobRow:
    figures: dict[str, Any] = {"asked_s": 0.0, "ttft_s": 0.0, "e2el_s": 0.0, "tpot_s": 0.0, "itl_s": ()}
    rows = tuple(CallRow(seat=seat, prompt_tokens=1, completion_tokens=tokens, **figures) for seat, tokens in calls)
    return JobRow("p", 1.0, 0, "phase", "id", arrived_s, 0.0, True, None, 0.0, 0.0, None, rows)


def test_jobs_that_arrive_late_end_late() -> None:
    engines = {"a": engine(0.01)}
    early, late = [job(0.0, ("a", 100))] * 4, [job(50.0, ("a", 100))]
    constants = Model(lanes=1, engines=engines)
    two_blocks = 2 * BLOCK_BYTES
    assert least_end_s(early, constants, two_blocks) == pytest.approx(200 * 0.01)
    assert least_end_s([*early, *late], constants, two_blocks) == pytest.approx(50 + 50 * 0.01)
