"""The report, its plots, and the comparison of two benchmarks, over folders as the runner writes them."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from runtime.bench import plots, report, results
from runtime.bench.compare import compare
from runtime.bench.metrics_table import METRICS
from runtime.bench.output import Output
from runtime.bench.results import CallRow, JobRow, Moment, Run, Slo, Summary
from runtime.cli.main import cli
from runtime.control.snapshot import EngineMoment
from runtime.errors import InputError

SPEED = {"static": 2.0, "mine": 1.0, "limit": 0.5}


def write(
    folder: Path, speed: Mapping[str, float] = SPEED, loads: tuple[float, ...] = (1.0,), **changes: object
) -> Path:
    """A benchmark of three repeats, in which a policy's jobs take so many seconds, give or take a tenth."""
    rng = random.Random(0)
    runs = []
    with Output(folder) as output:
        for repeat in range(3):
            for load in loads:
                for order, (policy, seconds) in enumerate(speed.items()):
                    jct_s = seconds * load * (1 + repeat / 20)
                    for number in range(30):
                        drawn = jct_s * rng.uniform(0.9, 1.1)
                        call = CallRow("solver", 0.1, drawn / 10, drawn, 0.01, (0.01, 0.02), 5, 10)
                        output.job(
                            JobRow(
                                policy, load, repeat, "a", str(number), 1, drawn, True, None, 0.1, 0.2, None, (call,)
                            )
                        )
                    for tick in range(600):
                        kv = (tick % 100 + 1) << 20
                        engine = EngineMoment(0.3, kv, kv // 2, 3, tick % 40, 64)
                        engines = {"planner": engine, "solver": replace(engine, waiting=5)}
                        if (away := tick // 20) in (5, 10):  # one starts again, then the other
                            del engines["planner" if away == 5 else "solver"]
                        output.moment(
                            Moment(policy, load, repeat, tick / 20, "tick", engines, {"solver": "so"}, 0, 0.01)
                        )
                    figures = {"p95_jct_s": jct_s, "median_jct_s": jct_s / 2, "goodput": 1 / jct_s, "accuracy": 1.0}
                    runs.append(Run(policy, load, repeat, order, {**figures, "p99_jct_s": jct_s * 2, "resizes": 7.0}))
    summary = Summary(
        kind="engines",
        workload="phases",
        config="mine.yaml",
        started="2026-01-01 00:00:00",
        seconds=100,
        command="troupe bench phases",
        machine={"cores": "2"},
        slo=Slo(jct_s=2),
        policies=tuple(speed),
        limit="limit" if "limit" in speed else None,
        loads=loads,
        repeats=3,
        points=results.points(runs),
        runs=tuple(runs),
    )
    results.write(folder, replace(summary, **changes))  # type: ignore[arg-type]  # a test's own
    return folder


def test_every_metric_that_is_described_has_a_sense(tmp_path: Path) -> None:
    assert all(metric.title and metric.digits >= 0 for metric in METRICS.values())


@pytest.mark.parametrize("loads", [(1.0,), (0.5, 1.0, 1.5)])
def test_plots_are_drawn_and_not_blank(tmp_path: Path, loads: tuple[float, ...]) -> None:
    drawn = plots.draw(write(tmp_path / "a", loads=loads))
    assert [plot.path.stem for plot in drawn] == ["latency", "jct-cdf", "ttft-cdf", "shares", "queues"]
    for plot in drawn:
        with Image.open(plot.path) as image:
            assert image.width >= 800
            colours = image.convert("RGB").getcolors(1 << 24)
            assert colours is not None
            assert len(colours) > 50


def test_the_report_stands_alone_and_marks_the_best_policy(tmp_path: Path) -> None:
    page = report.write(write(tmp_path / "a")).read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page
    assert "troupe bench phases" in page
    rows = {name: page.partition(f"<td>{name}</td>")[2].partition("</tr>")[0] for name in SPEED}
    assert "class=best" in rows["mine"]
    assert "class=best" not in rows["static"]
    assert "class=best" not in rows["limit"]  # faster, but no rival
    assert "1.05<small>1.00 to 1.10</small>" in rows["mine"]


def test_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"<script>alert(1)</script>": 1.0}, workload="<b>x</b>", notes=("<i>n</i>",))
    page = report.write(folder).read_text()
    assert "<script>" not in page
    assert "<b>x" not in page
    assert "&lt;i&gt;n" in page


def test_a_comparison_tells_noise_from_a_difference(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", {"static": 2.02, "mine": 0.5}, machine={"cores": "64"})
    found = compare(a, b)
    rows = {(row.policy, row.metric): row for row in found.rows}
    assert not rows["static", "p95_jct_s"].clear
    assert rows["static", "p95_jct_s"].better is None
    faster = rows["mine", "p95_jct_s"]
    assert (faster.clear, faster.better) == (True, "b")
    assert faster.ratio == pytest.approx(0.5)
    assert rows["mine", "goodput"].better == "b"
    assert not any(policy == "limit" for policy, _ in rows)
    assert found.warnings == ("machine differs: {'cores': '2'} and {'cores': '64'}",)


def test_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"static": 1.0}), write(tmp_path / "b", {"mine": 1.0})
    with pytest.raises(InputError, match="static at 1 there, mine at 1 here"):
        compare(a, b)
    with pytest.raises(InputError, match="give the folder that `troupe bench` wrote"):
        compare(a, tmp_path)
    (b / results.SUMMARY).write_text('{"kind": 3}')
    with pytest.raises(InputError, match=r"summary.json: kind: "):
        compare(a, b)


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", {"mine": 0.5})
    result = CliRunner().invoke(cli, ["bench", "compare", str(a), str(b)], env={"COLUMNS": "120"})
    assert "b is better" in result.output
    assert "0.500" in result.output


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    jobs = folder / results.JOBS
    jobs.write_bytes(jobs.read_bytes() + b'{"policy": 1}\n')
    with pytest.raises(InputError, match=r"jobs.jsonl, line 271: policy: "):
        list(results.read_jobs(folder))
