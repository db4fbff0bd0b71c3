"""Every code block of the READMEs outside `runtime` runs; tests/readmes.py has the rules."""

from pathlib import Path

import pytest

from tests.readmes import blocks, new_reader, readmes, try_out

READMES = readmes("README.md", ".github/*.md", "agents/**/*.md", "configs/**/*.md", "scripts/**/*.md")


@pytest.mark.e2e
@pytest.mark.parametrize("path", READMES)
def test_every_block_runs(tmp_path: Path, path: str) -> None:
    try_out(path, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nfalse\n```", "line 1: exit code 1"),
        ("\n```python\nraise SystemExit(3)\n```", "line 2: exit code 3"),
        ("```\ntroupe solve\n```", "no rule for a block of language ''"),
        ("<!-- test: file a.yaml -->\n```yaml\na: 1\n```\n```bash\ngrep b a.yaml\n```", "line 5: exit code 1"),
    ],
)
def test_failing_block_is_found(tmp_path: Path, text: str, message: str) -> None:
    reader = new_reader(tmp_path)
    *before, last = blocks(text)
    for block in before:
        reader.try_out(block, {})
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        reader.try_out(last, {})
