"""The report is one self-contained HTML file."""

from pathlib import Path

from runtime.bench import report
from tests.runtime.bench.benchmarks import SPEED, write_benchmark


def test_report_is_self_contained_and_marks_the_best_policy(tmp_path: Path) -> None:
    page = report.write(write_benchmark(tmp_path / "a")).read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page
    assert "troupe bench phases" in page
    rows = {name: page.partition(f"<td>{name}</td>")[2].partition("</tr>")[0] for name in SPEED}
    assert "class=best" in rows["mine"]
    assert "class=best" not in rows["static"]
    assert "class=best" not in rows["limit"]  # the fastest, but not a policy
    assert "1.05<small>1.00 to 1.10</small>" in rows["mine"]


def test_report_says_first_that_the_device_is_emulated(tmp_path: Path) -> None:
    page = report.write(write_benchmark(tmp_path / "a", emulation="emulated device: <8 ms>")).read_text()
    assert page.index("emulated device: &lt;8 ms&gt;") < page.index("<dl>")
    assert "emulated device" not in report.write(write_benchmark(tmp_path / "b")).read_text()


def test_report_escapes_names_and_notes(tmp_path: Path) -> None:
    folder = write_benchmark(
        tmp_path / "a", {"<script>alert(1)</script>": 1.0}, workload="<b>x</b>", notes=("<i>n</i>",)
    )
    page = report.write(folder).read_text()
    assert "<script>" not in page
    assert "<b>x" not in page
    assert "&lt;i&gt;n" in page
