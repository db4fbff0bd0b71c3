"""The reconstructed simulation gives the paper's published table."""

import json

import pytest
from click.testing import CliRunner

from runtime.cli.main import cli
from runtime.simulation import paper


def test_table_matches_the_published_figures() -> None:
    static, round_robin, adaptive = paper.table()
    assert (round(static.latency_s, 1), round(static.requests_per_s, 1)) == (110.3, 60.0)
    assert round(round_robin.latency_s, 1) == 756.8
    assert (round(adaptive.latency_s, 1), round(adaptive.requests_per_s, 1)) == (111.9, 58.1)
    assert 1 - adaptive.latency_s / round_robin.latency_s == pytest.approx(0.852, abs=0.001)
    assert all(round(row.cost, 3) == 0.020 for row in paper.table())


def test_most_of_round_robin_latency_is_the_charge_for_no_share() -> None:
    _, round_robin, _ = paper.table()
    assert round_robin.charged_s == 750
    assert round_robin.latency_s - round_robin.charged_s == pytest.approx(6.8, abs=0.05)


def test_underloaded_agent_has_no_latency() -> None:
    idle = [paper.Agent("a", 1, 100, 0.5, 1, 1), paper.Agent("b", 1, 100, 0.5, 1, 1)]
    assert paper.table(idle)[0].latency_s == 0


def test_command_prints_table_and_json() -> None:
    printed = CliRunner().invoke(cli, ["simulate", "paper"], env={"COLUMNS": "120"}).output
    assert "756.81 s" in printed
    assert "85.2% below round-robin" in printed
    rows = json.loads(CliRunner().invoke(cli, ["simulate", "paper", "--json"]).output)
    assert [row["policy"] for row in rows] == ["static", "round_robin", "paper"]
