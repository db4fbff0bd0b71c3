"""The report of `troupe serve`, also on a terminal that is gone and on a full disk."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest

from runtime.cli.serve_report import Report


def use(report: Report) -> None:
    report.add("listening", "listening on [bold]a port[/]", url="http://localhost")
    report.start_spinner()
    report.update_spinner("e dead")
    report.add("engine", "[red]engine e is dead[/]", engine="e")
    report.stop_spinner()


@pytest.fixture(params=["full disk", "closed pipe"])
def unwritable(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    """A file that opens and cannot be written."""
    if request.param == "full disk":
        file = Path("/dev/full").open("w")  # noqa: SIM115  closed below, where it raises
    else:
        reading, writing = os.pipe()
        os.close(reading)
        file = os.fdopen(writing, "w")
    yield file
    with suppress(OSError):
        file.close()


@pytest.mark.parametrize("as_json", [False, True])
def test_report_that_cannot_be_written_is_lost(
    unwritable: TextIO, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", unwritable)
    monkeypatch.setattr(sys, "stderr", unwritable)
    use(Report(as_json))


def test_lines_go_to_stderr_and_json_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    use(Report(as_json=False))
    use(Report(as_json=True))
    written = capsys.readouterr()
    assert "listening on a port" in written.err
    assert "engine e is dead" in written.err
    assert [json.loads(line) for line in written.out.splitlines()] == [
        {"event": "listening", "url": "http://localhost"},
        {"event": "engine", "engine": "e"},
    ]
