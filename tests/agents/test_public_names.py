"""The public names of `agents`: what authors of roles and workflows import."""

import re
import subprocess
import sys
from pathlib import Path
from types import UnionType

import pytest

import agents

FOLDER = Path(agents.__file__).parent
TEXTS = [FOLDER / "README.md", *sorted((FOLDER / "templates").rglob("*.in"))]
HEAVY = {"asyncio", "click", "fastapi", "numpy", "rich", "torch", "transformers", "vllm", "yaml"}


def test_names_are_sorted_and_unique() -> None:
    assert agents.__all__ == sorted(set(agents.__all__))


@pytest.mark.parametrize("name", agents.__all__)
def test_name_exists_and_has_a_docstring(name: str) -> None:
    value = getattr(agents, name)
    if not isinstance(value, UnionType):
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}("), "a dataclass without a docstring gets its signature"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_documentation_imports_public_names_only(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(r"^ *(?:import agents|from agents\.).*", text, re.MULTILINE)
    for names in re.findall(r"^ *from agents import (.*)$", text, re.MULTILINE):
        assert {name.strip() for name in names.split(",")} <= set(agents.__all__)


def test_importing_agents_imports_nothing_heavy() -> None:
    code = "import sys, agents; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
