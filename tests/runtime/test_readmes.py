"""Every code block of the READMEs of `runtime` runs; tests/readmes.py has the rules.

They are apart from the others, so that two processes run them side by side.
"""

from pathlib import Path

import pytest

from tests.readmes import readmes, try_out


@pytest.mark.e2e
@pytest.mark.parametrize("path", readmes("runtime/**/*.md"))
def test_every_block_runs(tmp_path: Path, path: str) -> None:
    try_out(path, tmp_path)
