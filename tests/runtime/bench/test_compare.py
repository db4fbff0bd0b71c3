"""Benchmarks are compared for the policies and loads that they share."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime.bench import results
from runtime.bench.compare import compare
from runtime.cli.main import cli
from runtime.errors import InputError
from tests.runtime.bench.benchmarks import write_benchmark


def test_comparison_tells_noise_from_a_difference(tmp_path: Path) -> None:
    a = write_benchmark(tmp_path / "a")
    b = write_benchmark(tmp_path / "b", {"static": 2.02, "mine": 0.5}, machine={"cores": "64"})
    comparison = compare(a, b)
    rows = {(row.policy, row.metric): row for row in comparison.rows}
    assert not rows["static", "p95_jct_s"].clear
    assert rows["static", "p95_jct_s"].better is None
    faster = rows["mine", "p95_jct_s"]
    assert (faster.clear, faster.better) == (True, "b")
    assert faster.ratio == pytest.approx(0.5)
    assert rows["mine", "goodput"].better == "b"
    assert not any(policy == "limit" for policy, _ in rows)
    assert comparison.warnings == ("machine differs: {'cores': '2'} and {'cores': '64'}",)


def test_comparison_warns_of_an_emulated_device(tmp_path: Path) -> None:
    real = write_benchmark(tmp_path / "real")
    emulated = write_benchmark(tmp_path / "emulated", emulation="emulated device: 8 ms")
    again = write_benchmark(tmp_path / "again", emulation="emulated device: 8 ms")
    slower = write_benchmark(tmp_path / "slower", emulation="emulated device: 9 ms")
    assert compare(real, real).warnings == ()
    assert compare(emulated, again).warnings == ("emulated device: 8 ms",)
    assert compare(real, emulated).warnings == (
        "the devices differ, so no figure compares. a has no emulated device. b has emulated device: 8 ms.",
    )
    assert "8 ms. b has emulated device: 9 ms" in compare(emulated, slower).warnings[0]


def test_comparison_errors_say_why(tmp_path: Path) -> None:
    a, b = write_benchmark(tmp_path / "a", {"static": 1.0}), write_benchmark(tmp_path / "b", {"mine": 1.0})
    with pytest.raises(InputError, match=r"has static at load 1, and .* has mine at load 1"):
        compare(a, b)
    with pytest.raises(InputError, match="give the folder that `troupe bench` wrote"):
        compare(a, tmp_path)
    (b / results.SUMMARY).write_text('{"kind": 3}')
    with pytest.raises(InputError, match=r"summary.json: kind: "):
        compare(a, b)


def test_compare_command_prints_a_table(tmp_path: Path) -> None:
    a, b = write_benchmark(tmp_path / "a"), write_benchmark(tmp_path / "b", {"mine": 0.5})
    result = CliRunner().invoke(cli, ["bench", "compare", str(a), str(b)], env={"COLUMNS": "120"})
    assert "b is better" in result.output
    assert "0.500" in result.output
