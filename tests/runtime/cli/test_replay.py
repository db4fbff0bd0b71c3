"""`troupe replay` shows both grants and both reasons of a difference, in a table and as JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime.cli.replay import replay
from runtime.control.decision_log import DecisionLog
from runtime.control.policy import Decision
from tests.runtime.control.builders import record


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of two decisions. The policy `static` differs from the first only, which pauses engine a."""
    logged = record()
    assert logged.decision is not None
    paused = replace(logged.decision.grants["a"], max_active_seqs=0, max_step_tokens=512)
    decision = Decision({**logged.decision.grants, "a": paused}, {"a": "b's turn", "b": "its turn"})
    with DecisionLog(tmp_path / "decisions.jsonl") as log:
        log.write(replace(logged, decision=decision))
        log.write(logged)
    return log.path


def test_table_shows_a_pause_beside_the_other_concurrency(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(replay, [str(log), "--policy", "static"])
    assert shown.exit_code == 0, shown.output
    assert "25.00%, paused, 512 tokens a step" in shown.output
    assert "25.00%, 64 sequences, 2048 tokens a step" in shown.output
    assert "b's turn" in shown.output
    assert "at 1 of 2 decisions" in shown.output
    assert "at 1, only one of the policies pauses an engine's admission" in shown.output


def test_json_has_both_grants(log: Path) -> None:
    shown = CliRunner().invoke(replay, [str(log), "--policy", "static", "--json"])
    difference, summary = map(json.loads, shown.output.splitlines())
    assert (difference["engine"], difference["reason"]) == ("a", "b's turn")
    assert difference["grant"]["max_active_seqs"] == 0
    assert difference["other_grant"]["max_active_seqs"] == 64
    assert (summary["summary"]["differing"], summary["summary"]["pausing"]) == (1, 1)
