"""The package of a new role: the rules for its name, its files, its installation and its own tests."""

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
"""pytest without the working folder on the import path, so that it tests the installed package."""


@pytest.mark.parametrize("name", ["second", "second-opinion", "critic2", "role", "a", "json", "x" * 40])
def test_every_valid_name_gives_a_package(name: str) -> None:
    texts = package(name, taken={"critic"})
    word = name.replace("-", "_")
    module = f"troupe_role_{word}"
    assert list(texts) == ["pyproject.toml", "README.md", f"{module}.py", f"tests/test_{word}.py", "team.yaml"]
    assert not [path for path, text in texts.items() if "@" in text]
    project = tomllib.loads(texts["pyproject.toml"])["project"]
    assert project["name"] == distribution(name) == f"troupe-role-{name}"
    [(registered, target)] = project["entry-points"]["troupe.roles"].items()
    assert registered == name
    assert target.partition(":")[0] == module
    assert f"class {target.partition(':')[2]}(ArithmeticCritic):" in texts[f"{module}.py"]
    assert all(compile(text, path, "exec") for path, text in texts.items() if path.endswith(".py"))


def test_team_file_adds_the_role_to_the_embedded_team_as_a_second_critic() -> None:
    assert yaml.safe_load(package("second-opinion", taken=())["team.yaml"]) == {
        "extends": "embedded",
        "team": {"second-opinion": {"role": "second-opinion", "engine": "critic"}},
        "workflow": {"name": "deliberate", "critics": ["critic", "second-opinion"]},
    }


@pytest.mark.parametrize(
    "name", ["", "Second", "2nd", "second_opinion", "-x", "x-", "x--y", "x y", "../x", "zweite-größe", "x" * 41, "x\n"]
)
def test_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(NameRefused, match="use lowercase letters, digits and single hyphens, start with a letter"):
        package(name, taken=())


@pytest.mark.parametrize("name", ["no", "yes", "on", "off", "true", "null", "y"])
def test_yaml_keyword_is_refused_as_a_name(name: str) -> None:
    with pytest.raises(NameRefused, match="YAML does not read it as text"):
        package(name, taken=())


def test_name_in_use_is_refused() -> None:
    with pytest.raises(NameRefused, match="a role named 'critic' exists already"):
        package("critic", taken={"critic"})


def test_tutorial_shows_the_role_of_the_package() -> None:
    readme = (ROOT / "agents" / "README.md").read_text()
    assert package("second-opinion", taken=())["troupe_role_second_opinion.py"] in readme


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of the package, and the folder that pip installed it into."""
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


def test_installed_package_registers_its_role(installed: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "from agents import find_role\n"
        "from agents.registry import find\n"
        "print(find('role', 'second-opinion').origin, find_role('second-opinion').__name__)"
    )
    printed = run([sys.executable, "-c", code], tmp_path, installed[1])
    assert printed.split() == ["troupe-role-second-opinion", "0.1.0", "SecondOpinionRole"]


def test_own_tests_of_the_package_pass(installed: tuple[Path, Path]) -> None:
    printed = run(PYTEST, *installed)
    assert "4 passed" in printed
    assert "skipped" not in printed


def test_own_tests_of_the_package_detect_a_defect(installed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, target = installed
    module = (target / "troupe_role_second_opinion.py").read_text()
    broken = module.replace("accepted=False", "accepted=True")
    assert broken != module
    (tmp_path / "troupe_role_second_opinion.py").write_text(broken)
    with pytest.raises(AssertionError, match="test_wrong_result_is_rejected_with_a_reason"):
        run(PYTEST, folder, tmp_path, target)


SOLVE = """
import yaml
from agents import find_role, find_workflow
from agents.arithmetic import oracle

team = yaml.safe_load(open("team.yaml"))
seats = {seat: find_role(f"arithmetic-{seat}")() for seat in ("planner", "solver", "critic")}
seats |= {seat: find_role(member["role"])() for seat, member in team["team"].items()}
chosen = find_workflow(team["workflow"].pop("name"))
workflow = chosen("(12+7)*3-45", chosen.Options.model_validate(team["workflow"]))
calls = workflow.begin()
while calls:
    call = calls.pop(0)
    [message] = seats[call.seat].messages(call.task)
    calls += workflow.take(call, seats[call.seat].parse(oracle.reply(message.content), call.task))
print(workflow.outcome.answer, [entry.seat for entry in workflow.transcript].count("second-opinion"))
"""


def test_role_judges_every_step_in_its_team(installed: tuple[Path, Path]) -> None:
    """Run the workflow of the package's team.yaml, with the oracle in place of the models."""
    folder, target = installed
    assert run([sys.executable, "-P", "-c", SOLVE], folder, target).split() == ["12", "3"]
