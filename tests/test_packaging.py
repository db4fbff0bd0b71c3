"""The wheel works without the repository, and every requirement is pinned."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SEATS = ("planner", "solver", "critic")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return folder


def troupe(installed: Path, elsewhere: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command. PYTHONPATH puts the installed packages before the repository's."""
    return subprocess.run(
        [str(installed / "bin" / "troupe"), *arguments],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(installed), "TROUPE_HOME": str(elsewhere)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_contains_packages_configurations_and_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*") if path.is_file()
    }
    assert {f"runtime/_configs/{path}" for path in shipped} <= names
    assert {f"runtime/_configs/models/{seat}/model.safetensors" for seat in SEATS} <= names
    assert "agents/templates/role/role.py.in" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"agents", "runtime"}


def test_installed_command_reads_its_own_configurations(installed: Path, tmp_path: Path) -> None:
    findings = json.loads(troupe(installed, tmp_path, "doctor", "--json").stdout)
    [models] = [finding for finding in findings if finding["name"] == "embedded models"]
    assert models["severity"] == "ok"
    code = "from runtime import config; print(config.SHIPPED); config.load('embedded')"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{installed}/runtime/_configs\n"


def test_installed_command_lists_built_in_roles(installed: Path, tmp_path: Path) -> None:
    result = troupe(installed, tmp_path, "roles", "--json")
    assert result.returncode == 0, result.stderr
    names = {role["name"] for role in json.loads(result.stdout)["roles"]}
    assert {"planner", "arithmetic-planner"} <= names


def pins(kind: str) -> dict[str, Requirement]:
    lines = (ROOT / "scripts" / f"constraints-{kind}.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.mark.parametrize("kind", ["cpu", "cuda", "test"])
def test_constraints_are_exact(kind: str) -> None:
    for requirement in pins(kind).values():
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert "*" not in str(requirement.specifier), requirement


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_every_requirement_is_pinned_within_its_bounds(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    requirements = [*project["dependencies"], *optional[extra], *optional["test"]]
    # constraints-cpu.txt does not pin torch, which setup.sh installs.
    pinned = {"torch": pins("cuda")["torch"]} | pins(extra) | pins("test")
    for requirement in map(Requirement, requirements):
        [pin] = pinned[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement}: pinned at {pin.version}"


def test_pins_of_test_tools_agree_with_the_others() -> None:
    test, cuda = pins("test"), pins("cuda")
    assert not test.keys() & pins("cpu").keys()
    assert all(str(cuda.get(name, line)) == str(line) for name, line in test.items())


def test_cpu_pins_agree_with_the_requirements_of_plain_torch() -> None:
    """setup.sh installs constraints-cpu.txt last, so a different pin would replace a version that torch requires."""
    cpu, cuda = pins("cpu"), pins("cuda")
    assert "torch" not in cpu
    required = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy", "triton"}
    required |= {"typing-extensions", *(name for name in cpu if name.startswith(("cuda-", "nvidia-cu")))}
    assert {str(cpu[name]) for name in required} == {str(cuda[name]) for name in required}


def test_fastapi_releases_that_read_forms_as_json_are_excluded() -> None:
    """`strict_content_type` came with 0.132. The refusal of cross-site forms relies on it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [bound] = [r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "fastapi"]
    assert not bound.contains("0.131.0")
