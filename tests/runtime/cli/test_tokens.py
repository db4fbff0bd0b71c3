"""`troupe tokens`."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime.cli.main import cli


def test_removing_the_last_token_prints_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
    run = CliRunner().invoke
    for name in ("one", "two"):
        assert run(cli, ["tokens", "add", name]).exit_code == 0
    assert run(cli, ["tokens", "remove", "one"]).stderr == ""
    last = run(cli, ["tokens", "remove", "two"])
    assert (last.exit_code, "rejects every request until you add one" in last.stderr) == (0, True)
