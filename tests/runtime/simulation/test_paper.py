"""The paper's table comes out of its parameters."""

import json

import pytest
from click.testing import CliRunner

from runtime.cli.main import cli
from runtime.simulation import paper


def test_the_published_figures_are_reproduced() -> None:
    static, turns, adaptive = paper.table()
    assert (round(static.latency_s, 1), round(static.requests_per_s, 1)) == (110.3, 60.0)
    assert round(turns.latency_s, 1) == 756.8
    assert (round(adaptive.latency_s, 1), round(adaptive.requests_per_s, 1)) == (111.9, 58.1)
    assert 1 - adaptive.latency_s / turns.latency_s == pytest.approx(0.852, abs=0.001)
    assert all(round(row.cost, 3) == 0.020 for row in paper.table())


def test_most_of_round_robins_latency_is_what_it_is_charged() -> None:
    _, turns, _ = paper.table()
    assert turns.charged_s == 750
    assert turns.latency_s - turns.charged_s == pytest.approx(6.8, abs=0.05)


def test_an_underloaded_agent_has_no_latency() -> None:
    idle = [paper.Agent("a", 1, 100, 0.5, 1, 1), paper.Agent("b", 1, 100, 0.5, 1, 1)]
    assert paper.table(idle)[0].latency_s == 0


def test_the_command_prints_it() -> None:
    printed = CliRunner().invoke(cli, ["simulate", "paper"], env={"COLUMNS": "120"}).output
    assert "756.81 s" in printed
    assert "85.2% below round-robin" in printed
    rows = json.loads(CliRunner().invoke(cli, ["simulate", "paper", "--json"]).output)
    assert [row["policy"] for row in rows] == ["static", "round_robin", "paper"]
