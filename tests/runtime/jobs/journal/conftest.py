"""An open journal over a new SQLite file."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.jobs.journal.journal import Journal


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with Journal(tmp_path / "jobs.db") as journal:
        yield journal
