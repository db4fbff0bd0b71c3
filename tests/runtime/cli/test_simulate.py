"""`troupe simulate`: where constants are written."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime.cli.simulate import simulate
from runtime.errors import InputError


@pytest.mark.parametrize("command", [["roofline", "l4"], ["fit"]])
@pytest.mark.parametrize("out", [".", "missing/constants.yaml"])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, command: list[str], out: str) -> None:
    result = CliRunner().invoke(simulate, [*command, "--out", str(tmp_path / out)])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(f"--out: {tmp_path / out} ")
