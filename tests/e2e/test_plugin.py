"""`troupe roles new`: the package is written, installed, checked, and used in a team with real engines."""

import json
import os
import subprocess
import sys

import pytest

from tests.e2e.conftest import REPOSITORY, Command

pytestmark = pytest.mark.e2e


def install(troupe: Command) -> None:
    """Install the package in `package` into a folder of its own on the import path of the command."""
    site = troupe.folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(troupe.folder / "package")], check=True)
    troupe.environment["PYTHONPATH"] = os.pathsep.join([str(site), str(REPOSITORY)])


def test_new_role_solves_in_a_team(troupe: Command) -> None:
    assert troupe.run("roles", "new", "second-opinion", "--dir", "package").returncode == 0
    install(troupe)
    listed = json.loads(troupe.run("roles", "--json").stdout)
    assert any(r["name"] == "second-opinion" and "troupe-role-second-opinion" in r["origin"] for r in listed["roles"])
    assert troupe.run("roles", "check", "second-opinion").returncode == 0
    done = troupe.run("solve", "(12+7)*3-45", "--config", "package/team.yaml", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["id"], result["answer"], result["confirmed"]) == ("1", "12", True)
    opinions = [step for step in result["steps"] if step["role"] == "second-opinion"]
    assert [step["verdict"] for step in opinions] == ["accepted"] * 3
    assert result["usage"]["second-opinion"]["completion_tokens"] > 0
    troupe.nothing_left()


def test_plugin_that_fails_to_import_breaks_only_the_team_that_uses_it(troupe: Command) -> None:
    troupe.run("roles", "new", "second-opinion", "--dir", "package")
    (troupe.folder / "package" / "troupe_role_second_opinion.py").write_text("import nowhere\n")
    install(troupe)
    broken = troupe.run("solve", "1+2", "--config", "package/team.yaml")
    assert broken.returncode == 2
    assert "team.second-opinion.role" in broken.stderr
    assert "nowhere" in broken.stderr
    assert not (troupe.folder / "home").exists()
    assert troupe.run("config", "check", "embedded").returncode == 0
