"""Policies run in turn over modelled engines, and each gets the same jobs at the same times."""

from pathlib import Path

import pytest
import yaml

from runtime.bench import results
from runtime.config import SHIPPED
from runtime.simulation.load import read as read_constants
from tests.runtime.bench.benchmarks import invoke
from tests.runtime.bench.conftest import WORKLOAD

PROBLEMS = SHIPPED / "problems" / "held-out.jsonl"


def test_every_policy_gets_the_same_jobs_and_answers_them(folder: Path) -> None:
    asked: dict[tuple[str, int], set[tuple[float, str]]] = {}
    for row in results.read_jobs(folder):
        assert row.error is None
        assert row.correct
        assert row.calls
        assert all(0 < call.ttft_s <= call.e2el_s for call in row.calls)
        assert row.jct_s > 0
        if row.phase == "a":
            asked.setdefault((row.policy, row.repeat), set()).add((row.arrived_s, row.phase))
    assert len(asked) == 6
    for repeat in (0, 1):
        assert asked["round_robin", repeat] == asked["waterfill", repeat] == asked["limit", repeat]
    assert asked["waterfill", 0] != asked["waterfill", 1]


def test_summary_has_every_metric_with_its_range(folder: Path) -> None:
    summary = results.read_summary(folder)
    assert (summary.kind, summary.repeats, summary.limit) == ("simulation", 2, "limit")
    assert summary.policies == ("round_robin", "waterfill", "limit")
    waterfill, round_robin = summary.point("waterfill", 1.0), summary.point("round_robin", 1.0)
    assert waterfill.metrics["p95_jct_s"].median < round_robin.metrics["p95_jct_s"].median
    assert waterfill.metrics["goodput"].median > round_robin.metrics["goodput"].median
    for name in ("median_ttft_ms", "p99_tpot_ms", "p90_itl_ms", "mean_e2el_ms", "request_throughput", "accuracy"):
        spread = waterfill.metrics[name]
        assert spread.least <= spread.median <= spread.most
    assert waterfill.metrics["accuracy"].median == 1
    assert waterfill.metrics["resizes"].median > 0
    assert waterfill.metrics["gib_seconds_per_job"].median > 0


def test_decisions_are_recorded(folder: Path) -> None:
    moments = list(results.read_moments(folder))
    assert {moment.policy for moment in moments} == {"round_robin", "waterfill", "limit"}
    assert {moment.cause for moment in moments} >= {"tick", "a burst"}
    waterfill = [moment for moment in moments if moment.policy == "waterfill"]
    assert len({moment.engines["solver"].kv_cache_bytes for moment in waterfill}) > 5
    assert all(moment.reasons["solver"] for moment in waterfill)


def test_existing_benchmark_is_not_overwritten(folder: Path) -> None:
    before = (folder / results.SUMMARY).read_bytes()
    result = invoke("simulate", "load", "phases", "--out", folder)
    assert "already holds a benchmark" in str(result.exception)
    assert (folder / results.SUMMARY).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "fastest"), "no policy is named 'fastest'"),
        (("-p", "static,static"), "--policies: give at least one policy, and none twice"),
        (("--loads", "1,many"), "--loads: give numbers above 0"),
        (("--loads", "0"), "--loads: give numbers above 0"),
        (("--config", "embedded"), "device.kv_cache_memory_bytes: this key is required"),
        (
            ("--constants", "l5"),
            "there is no file and no shipped model for --constants 'l5'; known: a100, ",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = invoke("simulate", "load", "phases", *arguments, "--out", tmp_path / "out")
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_lengths_of_an_unknown_engine_are_refused(tmp_path: Path) -> None:
    workload = {**WORKLOAD, "lengths": {"writer": {"prompt": [1, 2], "reply": [1, 2]}}, "problems": str(PROBLEMS)}
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(workload))
    result = invoke("simulate", "load", tmp_path / "w.yaml", "--out", tmp_path / "out")
    assert "lengths.writer: there is no such engine; the engines of embedded are planner" in str(result.exception)


def test_real_engines_refuse_lengths(tmp_path: Path) -> None:
    result = invoke("bench", "realistic", "--out", tmp_path / "out")
    assert "workload realistic: lengths: real engines have the lengths of their own" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_jobs_of_modelled_lengths_are_right_and_at_the_rate_of_the_gpu(tmp_path: Path) -> None:
    lengths = {name: {"prompt": [300, 900], "reply": [50, 100]} for name in ("planner", "solver", "critic")}
    phase = {"name": "a", "seconds": 400, "jobs_per_s": 3}
    (tmp_path / "realistic.yaml").write_text(
        yaml.safe_dump({"phases": [phase], "lengths": lengths, "problems": str(PROBLEMS)})
    )
    out = tmp_path / "out"
    command = ("simulate", "load", tmp_path / "realistic.yaml", "--constants", "l4", "-p", "waterfill", "--no-limit")
    result = invoke(*command, "--repeats", 1, "--out", out)
    assert result.exception is None, result.exception
    rows = list(results.read_jobs(out))
    assert len(rows) == pytest.approx(400 * 3 * read_constants("l4").rate_factors["realistic"], rel=0.3)
    assert all(row.correct for row in rows)
    calls = [call for row in rows for call in row.calls]
    assert {call.prompt_tokens for call in calls} <= set(range(300, 901))
    assert {call.completion_tokens for call in calls} <= set(range(50, 101))


def test_agents_are_faster_under_waterfill_than_static(tmp_path: Path) -> None:
    out = tmp_path / "agents"
    result = invoke("simulate", "agents", "-p", "static,waterfill", "--loads", "0.3,0.9", "--repeats", 1, "--out", out)
    assert result.exception is None, result.exception
    summary = results.read_summary(out)
    for load in (0.3, 0.9):
        assert summary.point("waterfill", load).metrics["failed"].median == 0
    busy = {policy: summary.point(policy, 0.9).metrics["p99_jct_s"].median for policy in summary.policies}
    assert busy["waterfill"] < busy["static"]


def test_every_token_is_streamed(folder: Path) -> None:
    calls = [call for row in results.read_jobs(folder) for call in row.calls]
    assert all(len(call.itl_s) == call.completion_tokens - 1 for call in calls)
    assert any(len(set(call.itl_s)) > 2 for call in calls)
    assert all(sum(call.itl_s) == pytest.approx(call.e2el_s - call.ttft_s, abs=1e-4) for call in calls)
    assert results.read_summary(folder).stream_interval == 1
    assert "every token is streamed" in (folder / "report.html").read_text()
