"""Policies in turn over modelled engines: the same jobs for each, right figures, and what is slower is found slower."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from runtime.bench import results
from runtime.bench.metrics import is_good, metrics
from runtime.bench.play import call_row
from runtime.bench.results import CallRow, JobRow, Slo
from runtime.cli.main import cli
from runtime.control.controller import Counts
from runtime.events import CallEnded

WORKLOAD = {
    "phases": [
        {"name": "a", "seconds": 4, "jobs_per_s": 6, "workflow": {"name": "vote", "samples": 6}},
        {"name": "b", "seconds": 4, "concurrency": 12, "workflow": {"plans": 6}},
    ],
    "slo": {"jct_s": 2},
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies and the limit, two repeats."""
    home = tmp_path_factory.mktemp("bench")
    problems = Path(__file__).parents[3] / "configs" / "problems" / "held-out.jsonl"
    (home / "w.yaml").write_text(yaml.safe_dump({**WORKLOAD, "problems": str(problems)}))
    out = home / "out"
    command = ("simulate", "load", home / "w.yaml", "-p", "round_robin,waterfill", "--repeats", 2, "--out", out)
    result = invoke(*command)
    assert result.exception is None, result.exception
    assert "waterfill" in result.output
    return out


def test_every_policy_gets_the_same_jobs_and_answers_them_right(folder: Path) -> None:
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


def test_the_summary_has_every_metric_with_its_range(folder: Path) -> None:
    summary = results.read_summary(folder)
    assert (summary.kind, summary.repeats, summary.limit) == ("simulation", 2, "limit")
    assert summary.policies == ("round_robin", "waterfill", "limit")
    ours, turns = summary.point("waterfill", 1.0), summary.point("round_robin", 1.0)
    assert ours.metrics["p95_jct_s"].median < turns.metrics["p95_jct_s"].median
    assert ours.metrics["goodput"].median > turns.metrics["goodput"].median
    for name in ("median_ttft_ms", "p99_tpot_ms", "p90_itl_ms", "mean_e2el_ms", "request_throughput", "accuracy"):
        spread = ours.metrics[name]
        assert spread.least <= spread.median <= spread.most
    assert ours.metrics["accuracy"].median == 1
    assert ours.metrics["resizes"].median > 0
    assert ours.metrics["gib_seconds_per_job"].median > 0


def test_what_the_controller_saw_is_kept(folder: Path) -> None:
    moments = list(results.read_moments(folder))
    assert {moment.policy for moment in moments} == {"round_robin", "waterfill", "limit"}
    assert {moment.cause for moment in moments} >= {"tick", "a burst"}
    ours = [moment for moment in moments if moment.policy == "waterfill"]
    assert len({moment.engines["solver"].kv_cache_bytes for moment in ours}) > 5
    assert all(moment.reasons["solver"] for moment in ours)


def test_a_folder_that_holds_a_benchmark_is_not_written_over(folder: Path) -> None:
    before = (folder / results.SUMMARY).read_bytes()
    result = invoke("simulate", "load", "phases", "--out", folder)
    assert "holds a benchmark already" in str(result.exception)
    assert (folder / results.SUMMARY).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-p", "fastest"), "no policy is named 'fastest'"),
        (("-p", "static,static"), "--policies: give at least one, and none twice"),
        (("--loads", "1,many"), "--loads: numbers above 0"),
        (("--loads", "0"), "--loads: numbers above 0"),
        (("--config", "embedded"), "device.kv_cache_memory_bytes: missing"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    result = invoke("simulate", "load", "phases", *arguments, "--out", tmp_path / "out")
    assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_papers_agents_at_half_and_full_load(tmp_path: Path) -> None:
    out = tmp_path / "agents"
    result = invoke("simulate", "agents", "-p", "static,waterfill", "--loads", "0.3,0.9", "--repeats", 1, "--out", out)
    assert result.exception is None, result.exception
    summary = results.read_summary(out)
    for load in (0.3, 0.9):
        assert summary.point("waterfill", load).metrics["failed"].median == 0
    busy = {policy: summary.point(policy, 0.9).metrics["p99_jct_s"].median for policy in summary.policies}
    assert busy["waterfill"] < busy["static"]


def call(**changes: Any) -> CallRow:
    values: dict[str, Any] = {
        "ttft_s": 0.1,
        "e2el_s": 1.1,
        "tpot_s": 0.1,
        "itl_s": (0.05, 0.15),
        "completion_tokens": 11,
    }
    return CallRow(seat="solver", asked_s=0, prompt_tokens=5, **(values | changes))


def test_a_calls_figures_come_from_its_chunks() -> None:
    row = call_row(CallEnded("j", "solver", "s", 10.0, (10.5, 10.6, 11.0), (1, 1, 4), 7), started_s=4.0)
    assert (row.asked_s, row.ttft_s, row.e2el_s, row.completion_tokens) == (6.0, 0.5, 1.0, 6)
    assert row.tpot_s == pytest.approx(0.1)
    assert row.itl_s == pytest.approx((0.1, 0.4))  # one for each message, of however many tokens
    nothing = call_row(CallEnded("j", "solver", "s", 10.0, (), (), 0), started_s=4.0)
    assert (nothing.ttft_s, nothing.tpot_s, nothing.itl_s) == (0, 0, ())


def job(**changes: Any) -> JobRow:
    values: dict[str, Any] = {"jct_s": 1.0, "correct": True, "error": None, "calls": (call(),)}
    return JobRow("p", 1, 0, "a", "1", 0.0, gib_seconds=2, engine_seconds=3, cost=1.0, **(values | changes))


def test_metrics_have_the_units_and_definitions_of_vllms() -> None:
    rows = [job(), job(jct_s=3.0, calls=(call(), call(ttft_s=0.3))), job(error="no", correct=False, calls=())]
    found = metrics(rows, 10, Slo(jct_s=2), Counts(decisions=7, resizes=5), 4)
    assert found["job_throughput"] == 0.2
    assert found["request_throughput"] == 0.3
    assert found["output_throughput"] == 3.3
    assert found["goodput"] == 0.1
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["jobs"], found["failed"], found["preemptions"], found["resizes"]) == (3, 1, 4, 5)
    assert found["mean_ttft_ms"] == pytest.approx(1000 * 0.5 / 3)
    assert found["median_tpot_ms"] == pytest.approx(100)
    assert found["median_itl_ms"] == pytest.approx(100)
    assert found["p99_itl_ms"] == pytest.approx(150)
    assert found["p99_jct_s"] == pytest.approx(2.98)
    assert found["cost_per_job"] == 1


@pytest.mark.parametrize("values", [[1.0], [3.0, 1.0], [0.5, 9.0, 2.0, 4.0, 4.0, 1.0, 30.0]])
def test_means_and_percentiles_are_numpys(values: list[float]) -> None:
    rows = [job(jct_s=value) for value in values]
    found = metrics(rows, 10, Slo(), Counts(), 0)
    assert found["mean_jct_s"] == pytest.approx(np.mean(values))
    assert found["median_jct_s"] == pytest.approx(np.median(values))
    for percent in (90, 95, 99):
        assert found[f"p{percent}_jct_s"] == pytest.approx(np.percentile(values, percent))


COUNT = """
import json, sys
from vllm.benchmarks.serve import RequestFuncOutput, calculate_metrics
outputs = [RequestFuncOutput(success=True, **call) for call in json.load(sys.stdin)]
found, _ = calculate_metrics([], outputs, 10.0, None, [90, 95, 99], {})
print(json.dumps(vars(found), default=float))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_calls_have_the_metrics_of_vllm_bench_serve(folder: Path) -> None:
    """The calls of a run as vLLM's own `calculate_metrics` counts them, in a process that may import vLLM."""
    calls = [call for row in results.read_jobs(folder) for call in row.calls][:500]
    outputs = [
        {
            "latency": call.e2el_s,
            "output_tokens": call.completion_tokens,
            "ttft": call.ttft_s,
            "itl": call.itl_s,
            "prompt_len": call.prompt_tokens,
            "start_time": call.asked_s,
        }
        for call in calls
    ]
    command = [sys.executable, "-c", COUNT]
    counted = subprocess.run(command, input=json.dumps(outputs), capture_output=True, text=True, check=True)
    theirs = json.loads(counted.stdout.splitlines()[-1])
    ours = metrics([job(calls=tuple(calls))], 10, Slo(), Counts(), 0)
    for name in ("ttft", "tpot", "itl", "e2el"):
        for figure in (f"mean_{name}_ms", f"median_{name}_ms"):
            assert ours[figure] == pytest.approx(theirs[figure]), figure
        for percent, value in theirs[f"percentiles_{name}_ms"]:
            assert ours[f"p{percent}_{name}_ms"] == pytest.approx(value), (percent, name)
    for figure in ("request_throughput", "output_throughput"):
        assert ours[figure] == pytest.approx(theirs[figure])


def test_every_token_is_streamed_and_the_results_say_so(folder: Path) -> None:
    calls = [call for row in results.read_jobs(folder) for call in row.calls]
    assert all(len(call.itl_s) == call.completion_tokens - 1 for call in calls)
    assert any(len(set(call.itl_s)) > 2 for call in calls)
    assert all(sum(call.itl_s) == pytest.approx(call.e2el_s - call.ttft_s, abs=1e-4) for call in calls)
    assert results.read_summary(folder).stream_interval == 1
    assert "every token is streamed" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("row", "slo", "good"),
    [
        (job(), Slo(), True),
        (job(), Slo(jct_s=0.9), False),
        (job(), Slo(ttft_s=0.05), False),
        (job(), Slo(tpot_s=0.1, ttft_s=0.1, jct_s=1), True),
        (job(correct=False), Slo(), False),
        (job(correct=None), Slo(), True),
        (job(error="died"), Slo(), False),
    ],
)
def test_a_good_job_meets_every_limit(row: JobRow, slo: Slo, good: bool) -> None:
    assert is_good(row, slo) is good


def test_the_summary_is_json_for_machines(folder: Path) -> None:
    data = json.loads((folder / results.SUMMARY).read_text())
    assert data["points"][0]["metrics"]["p95_jct_s"].keys() == {"median", "least", "most"}


def test_a_metric_that_a_repeat_has_not_is_spread_over_the_others() -> None:
    """A run in which no burst came has no time from a burst to its memory."""
    runs = [results.Run("p", 1, n, 0, {"jobs": n, **more}) for n, more in enumerate(({}, {"reaction_p50_ms": 3.0}, {}))]
    (point,) = results.points(runs)
    assert point.metrics["reaction_p50_ms"] == results.Spread(3, 3, 3)
    assert point.metrics["jobs"] == results.Spread(1, 0, 2)
