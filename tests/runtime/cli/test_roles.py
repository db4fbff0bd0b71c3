"""`troupe roles`: what it lists, writes and checks, and its exit codes."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from agents.registry import registered
from runtime.cli.roles import roles
from runtime.errors import ConfigError, InputError
from tests.plugins import ECHO, lay_out

TEXT = {"type": "string"}
SPEC = {
    "name": "mine",
    "task": "answer",
    "prompt": "Answer {problem}",
    "reply": {"type": "object", "properties": {"answer": TEXT}, "required": ["answer"]},
}


def troupe_roles(*arguments: str) -> Result:
    """Run the command in this process. `troupe` would print the message of an exception."""
    return CliRunner().invoke(roles, arguments)


def error_of(kind: type[Exception], *arguments: str) -> str:
    """Run the command and return the message of the exception that it raises."""
    result = troupe_roles(*arguments)
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


def listed() -> Mapping[str, Any]:
    result = troupe_roles("--json")
    assert result.exit_code == 0
    rows: Mapping[str, Any] = json.loads(result.stdout)
    return rows


def test_list_shows_names_tasks_origins_and_summaries() -> None:
    lines = [re.split(r"\s{2,}", line.strip()) for line in troupe_roles().stdout.splitlines()]
    assert ["role", "takes", "from"] in lines
    assert ["workflow", "from"] in lines
    rows = {line[0]: line[1:] for line in lines}
    [version] = {entry.origin for entry in registered("role") if entry.name == "solver"}
    assert rows["solver"] == [
        "solve, answer, debate",
        version,
        "A solver for any chat model. It solves one step of a plan, states the answer, or debates.",
    ]
    assert rows["python"] == [
        version,
        "A tool that runs the code of each call in a new process, which the sandbox isolates and limits.",
    ]
    assert rows["write"] == [version, "A request for any text, such as a draft, a summary or a program."]
    assert rows["vote"][0] == version
    assert rows["vote"][1].startswith("A vote: plan, solve each step several times")


def test_list_as_json() -> None:
    [solver] = [row for row in listed()["roles"] if row["name"] == "solver"]
    assert solver["takes"] == ["solve", "answer", "debate"]
    assert solver["fault"] is None
    assert {"deliberate", "vote", "solo"} <= {row["name"] for row in listed()["workflows"]}


def test_broken_plugins_are_listed_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"troupe.roles": {"dud": "dud_kit:Dud", "fine": "dud_kit_fine:Echo", "solver": "dud_kit_fine:Echo"}}
    sources = {"dud_kit": "raise RuntimeError('no [red]licence')", "dud_kit_fine": ECHO}
    monkeypatch.syspath_prepend(lay_out(tmp_path / "dud", "dud-kit", entries, sources))
    garbled = lay_out(tmp_path / "garbled", "garbled-kit", {})
    (garbled / "garbled_kit-1.0.dist-info" / "entry_points.txt").write_text("[troupe.roles]\nnonsense\n")
    monkeypatch.syspath_prepend(garbled)

    rows = {(row["name"], row["origin"]): row for row in listed()["roles"]}
    assert rows["dud", "dud-kit 1.0"]["fault"] == "importing dud_kit:Dud raised RuntimeError: no [red]licence"
    assert rows["fine", "dud-kit 1.0"]["fault"] is None
    assert rows["fine", "dud-kit 1.0"]["summary"] == "Repeats the problem."
    assert {bool(row["fault"]) for (name, _), row in rows.items() if name == "solver"} == {True}
    assert rows["critic", rows_origin(rows)]["fault"] is None
    assert listed()["unreadable"] == ["garbled-kit 1.0: its entry points cannot be read"]

    printed = troupe_roles().stdout
    assert "broken: importing dud_kit:Dud raised RuntimeError: no [red]licence" in printed
    assert "garbled-kit 1.0: its entry points cannot be read" in printed


def rows_origin(rows: Mapping[tuple[str, str], Any]) -> str:
    return next(origin for name, origin in rows if name == "critic")


def test_new_writes_a_package_and_prints_the_next_commands(tmp_path: Path) -> None:
    folder = tmp_path / "a folder" / "second"
    result = troupe_roles("new", "second-opinion", "--dir", str(folder))
    assert result.exit_code == 0
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "pyproject.toml",
        "team.yaml",
        "test_second_opinion.py",
        "troupe_role_second_opinion.py",
    ]
    assert f"pip install -e '{folder}'" in result.stdout
    assert "not empty" in error_of(InputError, "new", "other", "--dir", str(folder))


def test_new_without_a_folder_writes_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "troupe-role-second").mkdir()
    assert troupe_roles("new", "second").exit_code == 0
    assert (tmp_path / "troupe-role-second" / "pyproject.toml").is_file()


def test_new_refuses_bad_folders_and_names(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "give --dir another folder" in error_of(InputError, "new", "second", "--dir", str(tmp_path / "file"))
    assert "give --dir another folder" in error_of(InputError, "new", "second", "--dir", str(tmp_path / "file" / "x"))
    assert "a role named 'solver' exists already" in error_of(InputError, "new", "solver", "--dir", str(tmp_path / "s"))
    assert "lowercase" in error_of(InputError, "new", "Second", "--dir", str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("what", ["solver", "arithmetic-critic", "agents.roles.planner:Planner"])
def test_check_passes_a_sound_role(what: str) -> None:
    result = troupe_roles("check", what)
    assert (result.exit_code, result.stdout) == (0, f"{what}: OK\n")


def test_check_imports_a_class_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "draft_role.py").write_text(ECHO + "class Mute(Echo):\n    def messages(self, task): return []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # undoes what the command adds to the path
    assert troupe_roles("check", "draft_role:Echo").stdout == "draft_role:Echo: OK\n"
    result = troupe_roles("check", "draft_role:Mute")
    assert result.exit_code == 1
    assert result.stdout.startswith("draft_role:Mute: answer: messages() returned []: it must be a list")
    assert "there is no draft_role:Ekho" in error_of(ConfigError, "check", "draft_role:Ekho")
    assert "there is no missing_role:Echo" in error_of(ConfigError, "check", "missing_role:Echo")
    assert "must have the form module:Class" in error_of(ConfigError, "check", "draft_role:")


def test_check_reports_why_a_class_cannot_be_imported_or_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_import.py").write_text("import there_is_no_such_module")
    (tmp_path / "failing_init.py").write_text(ECHO + "class Role(Echo):\n    def __init__(self): self.nothing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    result = troupe_roles("check", "failing_import:Role")
    assert result.exit_code == 1
    assert "No module named 'there_is_no_such_module'" in result.stdout
    result = troupe_roles("check", "failing_init:Role")
    assert result.exit_code == 1
    assert "has no attribute 'nothing'; its constructor must need no arguments" in result.stdout


def test_check_reads_a_yaml_role(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    assert troupe_roles("check", str(path)).stdout == f"{path}: OK\n"
    path.write_text(yaml.safe_dump({**SPEC, "prompt": "Answer", "more": 1}))
    result = troupe_roles("check", str(path))
    assert result.exit_code == 1
    assert [line.split(": ")[1] for line in result.stdout.splitlines()] == ["prompt", "more"]
    assert all(line.startswith(f"{path}: ") for line in result.stdout.splitlines())


def test_check_refuses_unknown_names_and_missing_files(tmp_path: Path) -> None:
    assert "did you mean solver" in error_of(ConfigError, "check", "solvr")
    assert "No such file" in error_of(ConfigError, "check", str(tmp_path / "none.yaml"))


def test_json_is_an_option_of_the_list_only() -> None:
    result = troupe_roles("--json", "check", "solver")
    assert result.exit_code == 2
    assert "--json is an option of the list only" in result.output
