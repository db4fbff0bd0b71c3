"""A benchmark that the tests of this folder read."""

from pathlib import Path

import pytest
import yaml

from tests.runtime.bench.benchmarks import invoke

WORKLOAD = {
    "phases": [
        {"name": "a", "seconds": 4, "jobs_per_s": 6, "workflow": {"name": "vote", "samples": 6}},
        {"name": "b", "seconds": 4, "concurrency": 12, "workflow": {"plans": 6}},
    ],
    "slo": {"jct_s": 2},
}


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a benchmark of two policies and the limit, with two repeats."""
    home = tmp_path_factory.mktemp("bench")
    problems = Path(__file__).parents[3] / "configs" / "problems" / "held-out.jsonl"
    (home / "w.yaml").write_text(yaml.safe_dump({**WORKLOAD, "problems": str(problems)}))
    out = home / "out"
    command = ("simulate", "load", home / "w.yaml", "-p", "round_robin,waterfill", "--repeats", 2, "--out", out)
    result = invoke(*command)
    assert result.exception is None, result.exception
    assert "waterfill" in result.output
    return out
