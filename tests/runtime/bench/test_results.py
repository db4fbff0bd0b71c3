"""The files of a benchmark: damage is named with file and line, and spreads cover all runs."""

import json
from pathlib import Path

import pytest

from runtime.bench import results
from runtime.errors import InputError
from tests.runtime.bench.benchmarks import write_benchmark


def test_summary_is_json(folder: Path) -> None:
    data = json.loads((folder / results.SUMMARY).read_text())
    assert data["points"][0]["metrics"]["p95_jct_s"].keys() == {"median", "least", "most"}


def test_spread_ignores_runs_that_lack_a_metric() -> None:
    """A run without a burst has no reaction time."""
    runs = [results.Run("p", 1, n, 0, {"jobs": n, **more}) for n, more in enumerate(({}, {"reaction_p50_ms": 3.0}, {}))]
    (point,) = results.points(runs)
    assert point.metrics["reaction_p50_ms"] == results.Spread(3, 3, 3)
    assert point.metrics["jobs"] == results.Spread(1, 0, 2)


def test_damaged_line_is_named(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path / "a")
    jobs = folder / results.JOBS
    jobs.write_bytes(jobs.read_bytes() + b'{"policy": 1}\n')
    with pytest.raises(InputError, match=r"jobs.jsonl, line 271: policy: "):
        list(results.read_jobs(folder))


def test_every_row_says_whether_the_device_was_emulated(tmp_path: Path) -> None:
    real = write_benchmark(tmp_path / "real")
    emulated = write_benchmark(tmp_path / "emulated", emulation="emulated device: 8 ms")
    for folder, said in ((real, False), (emulated, True)):
        assert {row.emulated for row in results.read_jobs(folder)} == {said}
        assert {moment.emulated for moment in results.read_moments(folder)} == {said}
