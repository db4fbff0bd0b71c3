"""Imports point one way, and each foreign library has its own module (design.md, style.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = ("agents", "runtime")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "agents": ("agents",),
    "runtime.errors": (),
    "runtime.run_folder": ("runtime.config", "runtime.errors"),
    "runtime.access": ("agents", "runtime.errors"),
    "runtime.config": ("agents", "runtime.errors", "runtime.engines.base"),
    "runtime.events": ("agents", "runtime.engines.base", "runtime.jobs.recorded"),
    "runtime.engines": ("agents", "runtime.errors", "runtime.events", "runtime.engines"),
    "runtime.daemon": (),
    "runtime.telemetry": ("runtime.daemon", "runtime.errors", "runtime.events", "runtime.telemetry"),
    "runtime.control": (
        "agents",
        "runtime.errors",
        "runtime.events",
        "runtime.engines",
        "runtime.telemetry",
        "runtime.control",
    ),
    "runtime.jobs": (
        "agents",
        "runtime.errors",
        "runtime.config",
        "runtime.events",
        "runtime.engines",
        "runtime.telemetry",
        "runtime.jobs",
    ),
    "runtime.doctor": ("runtime.telemetry",),
    "runtime.session": (
        "runtime.config",
        "runtime.control",
        "runtime.daemon",
        "runtime.engines",
        "runtime.events",
        "runtime.jobs",
        "runtime.telemetry",
    ),
    "runtime.simulation": (
        "agents",
        "runtime.bench.workload",
        "runtime.config",
        "runtime.control",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
        "runtime.session",
        "runtime.simulation",
    ),
    "runtime.bench": (
        "runtime.bench",
        "runtime.config",
        "runtime.control",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
        "runtime.session",
    ),
    "runtime.commands": ("agents", "runtime.config", "runtime.engines.base", "runtime.errors", "runtime.session"),
    "runtime.status": ("runtime.control", "runtime.engines.base", "runtime.events"),
    "runtime.bus": (
        "agents",
        "runtime.bus",
        "runtime.commands",
        "runtime.config",
        "runtime.control.snapshot",
        "runtime.engines.base",
        "runtime.errors",
        "runtime.jobs",
        "runtime.session",
        "runtime.status",
    ),
    "runtime.server": (
        "agents",
        "runtime.access",
        "runtime.bus",
        "runtime.commands",
        "runtime.config",
        "runtime.control",
        "runtime.engines.base",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
        "runtime.run_folder",
        "runtime.server",
        "runtime.session",
        "runtime.status",
    ),
    "runtime.cli": EVERYTHING,
    "scripts": EVERYTHING,
}
"""What each part may import of ours, from the bottom up. A new part is entered here with the part that it adds."""

MODEL_MAKERS = ("scripts/train_embedded.py", "scripts/tiny_model.py")
ON_THE_GPU = "scripts/gpu_acceptance.py"

OWNERS: dict[str, tuple[str, ...]] = {
    "vllm": (
        ON_THE_GPU,
        "runtime/engines/vllm_engine.py",  # the client's side
        "runtime/engines/preload.py",  # these run where the engines are made
        "runtime/engines/elastic/",
    ),
    "torch": ("runtime/engines/", ON_THE_GPU, *MODEL_MAKERS),
    "transformers": MODEL_MAKERS,
    "tokenizers": MODEL_MAKERS,
    "cuda": ("runtime/engines/elastic/cuda_pages.py",),
    "pynvml": ("runtime/telemetry/nvml.py",),
    "yaml": ("runtime/config.py",),
    "matplotlib": ("runtime/bench/plots.py",),
    "aiomqtt": ("runtime/bus/client.py", "scripts/measure_service.py"),
    "amqtt": ("runtime/bus/embedded.py",),
    "fastapi": ("runtime/server/",),
    "uvicorn": ("runtime/server/serve.py",),
    "prometheus_client": ("runtime/server/metrics.py",),
    "sqlite3": ("runtime/jobs/journal.py",),
}
"""Who may import a foreign library: files, or folders ending in a slash."""

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for part in ("agents", "runtime", "scripts")
    for path in (ROOT / part).rglob("*.py")
)


def imported(source: str) -> Iterator[str]:
    """Full names of what a module imports, wherever in it; `from a import b` gives a.b, b being a module or not."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                above = "." * node.level + (node.module or "")
                yield from (f"{above}.{alias.name}" for alias in node.names)


def within(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def part_of(path: str) -> str:
    """The entry of MAY_IMPORT that a file belongs to."""
    name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return next((part for part in MAY_IMPORT if within(name, part)), name)


def offences(path: str, source: str) -> list[str]:
    """What a file imports and should not."""
    allowed = MAY_IMPORT.get(part_of(path), ())
    found = []
    for name in imported(source):
        library = name.partition(".")[0]
        ours = library in EVERYTHING and not any(within(name, part) for part in allowed)
        foreign = library in OWNERS and not any(
            path == o or (o[-1] == "/" and path.startswith(o)) for o in OWNERS[library]
        )
        if ours or foreign or name.startswith("."):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_imports_of(path: str) -> None:
    assert path.endswith("runtime/__init__.py") or part_of(path) in MAY_IMPORT, f"enter {path} in MAY_IMPORT"
    assert offences(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("agents/role.py", "from runtime.errors import ConfigError", ["runtime.errors.ConfigError"]),
        ("agents/role.py", "def f():\n    import yaml", ["yaml"]),
        ("runtime/engines/base.py", "from runtime import jobs, errors", ["runtime.jobs"]),
        ("runtime/engines/base.py", "import vllm.config", ["vllm.config"]),
        ("runtime/engines/elastic/pages.py", "import torch, vllm", []),
        ("runtime/events.py", "from runtime.engines import base, fake", ["runtime.engines.fake"]),
        ("runtime/jobs/job.py", "from runtime.cli import main\nfrom . import batch", ["runtime.cli.main", "..batch"]),
        ("runtime/telemetry/host.py", "from pynvml import nvmlInit", ["pynvml.nvmlInit"]),
        ("runtime/cli/solve.py", "from runtime.jobs import job\nimport torch", ["torch"]),
        ("runtime/unheard_of.py", "import runtime.errors", ["runtime.errors"]),
    ],
)
def test_offences_are_found(path: str, source: str, wrong: list[str]) -> None:
    assert offences(path, source) == wrong


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, runtime.cli.main; print(sorted({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
