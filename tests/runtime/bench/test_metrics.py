"""Metrics have the units and definitions of `vllm bench serve`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bench import results
from runtime.bench.metrics import is_good, metrics
from runtime.bench.results import CallRow, JobRow, Slo
from runtime.control.controller import Counts


def call(**changes: Any) -> CallRow:
    values: dict[str, Any] = {
        "ttft_s": 0.1,
        "e2el_s": 1.1,
        "tpot_s": 0.1,
        "itl_s": (0.05, 0.15),
        "completion_tokens": 11,
    }
    return CallRow(seat="solver", asked_s=0, prompt_tokens=5, **(values | changes))


def job(**changes: Any) -> JobRow:
    values: dict[str, Any] = {"jct_s": 1.0, "correct": True, "error": None, "calls": (call(),)}
    return JobRow("p", 1, 0, "a", "1", 0.0, gib_seconds=2, engine_seconds=3, cost=1.0, **(values | changes))


def test_metrics_have_the_units_and_definitions_of_vllm() -> None:
    rows = [job(), job(jct_s=3.0, calls=(call(), call(ttft_s=0.3))), job(error="no", correct=False, calls=())]
    measured = metrics(rows, 10, Slo(jct_s=2), Counts(decisions=7, resizes=5), 4)
    assert measured["job_throughput"] == 0.2
    assert measured["request_throughput"] == 0.3
    assert measured["output_throughput"] == 3.3
    assert measured["goodput"] == 0.1
    assert measured["accuracy"] == pytest.approx(2 / 3)
    assert (measured["jobs"], measured["failed"], measured["preemptions"], measured["resizes"]) == (3, 1, 4, 5)
    assert measured["mean_ttft_ms"] == pytest.approx(1000 * 0.5 / 3)
    assert measured["median_tpot_ms"] == pytest.approx(100)
    assert measured["median_itl_ms"] == pytest.approx(100)
    assert measured["p99_itl_ms"] == pytest.approx(150)
    assert measured["p99_jct_s"] == pytest.approx(2.98)
    assert measured["cost_per_job"] == 1


@pytest.mark.parametrize("values", [[1.0], [3.0, 1.0], [0.5, 9.0, 2.0, 4.0, 4.0, 1.0, 30.0]])
def test_means_and_percentiles_equal_numpys(values: list[float]) -> None:
    rows = [job(jct_s=value) for value in values]
    measured = metrics(rows, 10, Slo(), Counts(), 0)
    assert measured["mean_jct_s"] == pytest.approx(np.mean(values))
    assert measured["median_jct_s"] == pytest.approx(np.median(values))
    for percent in (90, 95, 99):
        assert measured[f"p{percent}_jct_s"] == pytest.approx(np.percentile(values, percent))


COUNT = """
import json, sys
from vllm.benchmarks.serve import RequestFuncOutput, calculate_metrics
outputs = [RequestFuncOutput(success=True, **call) for call in json.load(sys.stdin)]
found, _ = calculate_metrics([], outputs, 10.0, None, [90, 95, 99], {})
print(json.dumps(vars(found), default=float))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_metrics_of_calls_equal_those_of_vllm_bench_serve(folder: Path) -> None:
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
def test_good_job_meets_every_limit(row: JobRow, slo: Slo, good: bool) -> None:
    assert is_good(row, slo) is good
