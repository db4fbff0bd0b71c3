"""`troupe bench` with real engines: two policies, a report, and a replay of the logged decisions."""

import html
import json
from pathlib import Path

import pytest

from runtime.bench import results
from tests.e2e.conftest import LONG_S, REPOSITORY, Command, wait_until

pytestmark = pytest.mark.e2e

WORKLOAD = f"""
problems: {REPOSITORY}/configs/problems/held-out.jsonl
slo: {{jct_s: 30}}
phases:
  - {{name: plan, seconds: 2, jobs_per_s: 8, workflow: {{plans: 6, critics: []}}}}
  - {{name: vote, seconds: 2, concurrency: 10, workflow: {{name: vote, samples: 4}}}}
"""
SHORT_WORKLOAD = f"""
problems: {REPOSITORY}/configs/problems/held-out.jsonl
phases:
  - {{name: plan, seconds: 1, concurrency: 2, workflow: {{plans: 2}}}}
"""


def test_bench_runs_policies_and_replay_reads_its_log(troupe: Command, tmp_path: Path) -> None:
    workload, out = tmp_path / "mine.yaml", tmp_path / "out"
    workload.write_text(WORKLOAD)
    policies = "round_robin,waterfill"
    done = troupe.run("bench", workload, "-p", policies, "--repeats", 1, "--no-limit", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    troupe.nothing_left()
    summary = results.read_summary(out)
    assert json.loads(done.stdout)["policies"] == ["round_robin", "waterfill"]
    for policy in ("round_robin", "waterfill"):
        metrics = summary.point(policy, 1.0).metrics
        assert metrics["failed"].median == 0
        assert metrics["policy_faults"].median == 0
        assert metrics["accuracy"].median > 0.95
        assert metrics["resizes"].median > 0
    assert {row.phase for row in results.read_jobs(out)} == {"plan", "vote"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5

    [log] = (tmp_path / "home").rglob("decisions.jsonl")
    replayed = troupe.run("replay", log, "--policy", "static", "--json")
    assert replayed.returncode == 0, replayed.stderr
    totals = json.loads(replayed.stdout.splitlines()[-1])["summary"]
    assert totals["records"] > 20
    assert totals["differing"] > 5
    assert totals["faults"] == 0


def test_bench_on_an_emulated_device_says_so_in_every_output(troupe: Command, tmp_path: Path) -> None:
    workload, out = tmp_path / "mine.yaml", tmp_path / "out"
    workload.write_text(SHORT_WORKLOAD)
    times = "planner=20,solver=30+0.5,critic=25"
    done = troupe.run("bench", workload, "-p", "static", "--repeats", 1, "--no-limit", "--out", out, "--emulate", times)
    assert done.returncode == 0, done.stderr
    troupe.nothing_left()
    said = (
        "emulated device: CPU engines take turns, at least 20 ms (planner), 30 ms + 0.5 ms a sequence (solver), "
        "25 ms (critic) a step; these are not a GPU's figures"
    )
    assert said in " ".join(done.stdout.split())
    assert said in html.unescape((out / "report.html").read_text())
    assert json.loads((out / results.SUMMARY).read_text())["emulation"] == said
    metrics = results.read_summary(out).point("static", 1.0).metrics
    assert metrics["failed"].median == 0
    assert metrics["median_tpot_ms"].median >= 20


def test_interrupted_bench_keeps_its_rows_and_ends_its_engines(troupe: Command, tmp_path: Path) -> None:
    workload, out = tmp_path / "mine.yaml", tmp_path / "out"
    workload.write_text(SHORT_WORKLOAD)
    process = troupe.start("bench", workload, "-p", "static", "--repeats", 500, "--out", out)
    jobs = out / results.JOBS
    wait_until(lambda: process.poll() is not None or (jobs.exists() and jobs.stat().st_size > 0))
    assert troupe.engines()
    process.terminate()
    _, errors = process.communicate(timeout=LONG_S)
    assert process.returncode == 143, errors
    troupe.nothing_left()
    assert not (out / results.SUMMARY).exists()
    assert list(results.read_jobs(out))
