"""A new role's package: its name's rules, its files, and that it installs, registers and passes its own tests."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import agents
from agents.scaffold import NameRefused, distribution, package

ROOT = Path(agents.__file__).parent.parent
PYTEST = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
"""Without the working folder on the path: what is tested is what was installed."""


@pytest.mark.parametrize("name", ["second", "second-opinion", "critic2", "role", "a", "json", "x" * 40])
def test_a_name_gives_a_package_of_its_own(name: str) -> None:
    texts = package(name, taken={"critic"})
    word = name.replace("-", "_")
    module = f"troupe_role_{word}"
    assert list(texts) == ["pyproject.toml", "README.md", f"{module}.py", f"tests/test_{word}.py", "team.yaml"]
    assert not [path for path, text in texts.items() if "@" in text.replace("@pytest.mark", "")]
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    assert project["name"] == distribution(name) == f"troupe-role-{name}"
    [(registered, target)] = project["entry-points"]["troupe.roles"].items()
    assert registered == name
    assert target.partition(":")[0] == module
    assert f"class {target.partition(':')[2]}(Role):" in texts[f"{module}.py"]
    assert all(compile(text, path, "exec") for path, text in texts.items() if path.endswith(".py"))


def test_the_team_is_the_embedded_one_with_the_role_as_a_second_critic() -> None:
    assert yaml.safe_load(package("second-opinion", taken=())["team.yaml"]) == {
        "extends": "embedded",
        "team": {"second-opinion": {"role": "second-opinion", "engine": "solver"}},
        "workflow": {"name": "deliberate", "critics": ["critic", "second-opinion"]},
    }


@pytest.mark.parametrize(
    "name", ["", "Second", "2nd", "second_opinion", "-x", "x-", "x--y", "x y", "../x", "zweite-größe", "x" * 41, "x\n"]
)
def test_a_name_that_could_not_be_a_package_s_is_refused(name: str) -> None:
    with pytest.raises(NameRefused, match="lowercase letters, digits and single hyphens, a letter first"):
        package(name, taken=())


@pytest.mark.parametrize("name", ["no", "yes", "on", "off", "true", "null", "y"])
def test_a_name_that_yaml_does_not_read_as_text_is_refused(name: str) -> None:
    with pytest.raises(NameRefused, match="YAML reads it as no text"):
        package(name, taken=())


def test_the_name_of_another_role_is_refused() -> None:
    with pytest.raises(NameRefused, match="there is a role 'critic' already"):
        package("critic", taken={"critic"})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package's folder, and the folder that pip built and installed it into."""
    folder, target = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    for path, text in package("second-opinion", taken=()).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(folder)], folder)
    return folder, target


def run(command: list[str], folder: Path, *path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_installs_and_registers_its_role(installed: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "from agents.registry import find, find_role\n"
        "print(find('role', 'second-opinion').origin, find_role('second-opinion').__name__)"
    )
    said = run([sys.executable, "-c", code], tmp_path, installed[1])
    assert said.split() == ["troupe-role-second-opinion", "0.1.0", "SecondOpinionRole"]


def test_the_package_s_own_tests_pass(installed: tuple[Path, Path]) -> None:
    said = run(PYTEST, *installed)
    assert " passed" in said
    assert "skipped" not in said


def test_the_package_s_own_tests_can_fail(installed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, target = installed
    module = (target / "troupe_role_second_opinion.py").read_text()
    broken = module.replace("-result if sign", "result if sign")
    assert broken != module
    (tmp_path / "troupe_role_second_opinion.py").write_text(broken)
    with pytest.raises(AssertionError, match=r"test_a_right_result_is_accepted\[7-12"):
        run(PYTEST, folder, tmp_path, target)


SOLVE = """
import yaml
from agents.arithmetic import oracle
from agents.registry import find_role, find_workflow

team = yaml.safe_load(open("team.yaml"))
seats = {seat: find_role(f"arithmetic-{seat}")() for seat in ("planner", "solver", "critic")}
seats |= {seat: find_role(member["role"])() for seat, member in team["team"].items()}
chosen = find_workflow(team["workflow"].pop("name"))
workflow = chosen("(12+7)*3-45", chosen.Options.model_validate(team["workflow"]))
due = workflow.begin()
while due:
    call = due.pop(0)
    [message] = seats[call.seat].messages(call.task)
    due += workflow.take(call, seats[call.seat].parse(oracle.reply(message.content), call.task))
print(workflow.outcome.answer, [entry.seat for entry in workflow.transcript].count("second-opinion"))
"""


def test_the_role_judges_every_step_in_its_team(installed: tuple[Path, Path]) -> None:
    """The workflow of the package's team.yaml, with the oracle in place of the models."""
    folder, target = installed
    assert run([sys.executable, "-P", "-c", SOLVE], folder, target).split() == ["12", "3"]
