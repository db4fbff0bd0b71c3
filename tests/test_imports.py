"""Imports point down the layers, packages and modules form no cycle, and each foreign library has its own module."""

import subprocess
import sys
from graphlib import CycleError

import pytest

from scripts import import_graph
from scripts.import_graph import ROOT, imported, module_name, package_of

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "agents": (),
    "runtime.errors": (),
    "runtime.daemon_thread": (),
    "runtime.logs": (),
    "runtime.engines": ("agents", "runtime.errors"),
    "runtime.telemetry": ("runtime.daemon_thread",),
    "runtime.tools": ("agents", "runtime.errors"),
    "runtime.config": ("agents", "runtime.engines.spec", "runtime.errors", "runtime.tools.mcp.settings"),
    "runtime.events": ("agents", "runtime.engines.handle", "runtime.engines.request", "runtime.engines.usage"),
    "runtime.doctor": ("runtime.telemetry",),
    "runtime.paths": ("runtime.config",),
    "runtime.run_folder": ("runtime.errors", "runtime.paths"),
    "runtime.control": (
        "agents",
        "runtime.config",
        "runtime.daemon_thread",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.telemetry",
    ),
    "runtime.residency": ("runtime.control", "runtime.engines", "runtime.errors", "runtime.events"),
    "runtime.devices": (
        "runtime.config",
        "runtime.control",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.residency",
        "runtime.telemetry",
    ),
    "runtime.cluster": (
        "runtime.config",
        "runtime.control",
        "runtime.devices",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.residency",
    ),
    "runtime.jobs": (
        "agents",
        "runtime.config",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.tools",
    ),
    "runtime.assembly": (
        "runtime.cluster",
        "runtime.config",
        "runtime.control",
        "runtime.devices",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
        "runtime.residency",
        "runtime.tools",
    ),
    "runtime.bench": (
        "agents",
        "runtime.assembly",
        "runtime.config",
        "runtime.control",
        "runtime.engines.step_time",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
        "runtime.residency",
    ),
    "runtime.simulation": (
        "agents",
        "runtime.assembly",
        "runtime.bench.workload",
        "runtime.cluster",
        "runtime.config",
        "runtime.control",
        "runtime.devices",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
    ),
    "runtime.tracing": (
        "agents",
        "runtime.config",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
    ),
    "runtime.api": (
        "agents",
        "runtime.assembly",
        "runtime.config",
        "runtime.control",
        "runtime.devices",
        "runtime.engines",
        "runtime.errors",
        "runtime.events",
        "runtime.jobs",
        "runtime.paths",
        "runtime.tracing",
    ),
    "runtime.cli": import_graph.OURS,
    "scripts": (*import_graph.OURS, "scripts"),
}
"""What each package may import of ours beside itself, from the bottom up. A new package is entered with its code."""

MODEL_MAKERS = ("scripts/train_embedded.py", "scripts/tiny_model.py", "scripts/chat_model.py")
ON_THE_GPU = "scripts/gpu_acceptance.py"

OWNERS: dict[str, tuple[str, ...]] = {
    "vllm": (
        ON_THE_GPU,
        "runtime/engines/vllm_engine.py",  # the client's side
        "runtime/engines/vllm_config.py",
        "runtime/engines/sampling.py",
        "runtime/engines/engine_client.py",  # below vLLM's serving layer
        "runtime/api/http/vllm_serving.py",  # above it
        "runtime/engines/forkserver_preload.py",  # these run where the engines are made
        "runtime/engines/elastic/",
    ),
    "torch": ("runtime/engines/", ON_THE_GPU, *MODEL_MAKERS),
    "transformers": MODEL_MAKERS,
    "tokenizers": MODEL_MAKERS,
    "cuda": (
        "runtime/engines/elastic/cuda_driver.py",
        "runtime/engines/elastic/cuda_pages.py",
        "runtime/engines/elastic/cuda_weights.py",
    ),
    "pynvml": ("runtime/telemetry/nvml.py",),
    "yaml": ("runtime/config/files.py",),
    "matplotlib": ("runtime/bench/plots.py",),
    "aiomqtt": ("runtime/api/mqtt/connection.py", "scripts/measure_service.py", "scripts/drill_service.py"),
    "amqtt": ("runtime/api/mqtt/embedded_broker.py",),
    "fastapi": ("runtime/api/http/",),
    "uvicorn": ("runtime/api/http/server.py",),
    "prometheus_client": ("runtime/api/http/metrics.py",),
    "mcp": ("runtime/tools/mcp/",),
    "opentelemetry": ("runtime/tracing/",),
    "ray": ("runtime/cluster/ray_nodes.py", "scripts/ray_machines.py", "scripts/ray_autoscaler.py"),
    "msgspec": ("runtime/cluster/wire.py", "runtime/engines/"),
    "sqlite3": ("runtime/jobs/journal/database.py",),
}
"""Who may import a foreign library: files, or folders ending in a slash."""

SOURCES = import_graph.sources("agents", "runtime", "scripts")


def within(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def offences(path: str, source: str) -> list[str]:
    """Return the names that a file imports and must not."""
    package = package_of(module_name(path))
    allowed = (package, *MAY_IMPORT.get(package, ()))
    found = []
    for name in imported(source):
        library = name.partition(".")[0]
        ours = library in import_graph.OURS and not any(within(name, part) for part in allowed)
        foreign = library in OWNERS and not any(
            path == o or (o[-1] == "/" and path.startswith(o)) for o in OWNERS[library]
        )
        if ours or foreign or name.startswith("."):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_imports_of(path: str) -> None:
    assert path == "runtime/__init__.py" or package_of(module_name(path)) in MAY_IMPORT, f"enter {path} in MAY_IMPORT"
    assert offences(path, SOURCES[path]) == []


def test_what_packages_may_import_lies_below_them() -> None:
    order = list(MAY_IMPORT)
    for package, names in MAY_IMPORT.items():
        if package not in ("runtime.cli", "scripts"):
            assert all(order.index(package_of(name)) < order.index(package) for name in names), package


def test_packages_and_modules_form_no_cycle() -> None:
    files = import_graph.sources(*import_graph.OURS)
    import_graph.layers(import_graph.package_graph(files))
    import_graph.layers(import_graph.module_graph(files))


def test_a_cycle_is_found() -> None:
    files = {"runtime/a/x.py": "from runtime.b.y import Y", "runtime/b/y.py": "import runtime.a.x"}
    with pytest.raises(CycleError):
        import_graph.layers(import_graph.package_graph(files))


def test_the_graph_in_the_readme_is_the_code_s() -> None:
    assert import_graph.drawn() in (ROOT / "runtime/README.md").read_text()


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("agents/role.py", "from runtime.errors import ConfigError", ["runtime.errors.ConfigError"]),
        ("agents/role.py", "def f():\n    import yaml", ["yaml"]),
        ("runtime/engines/handle.py", "from runtime import jobs, errors", ["runtime.jobs"]),
        ("runtime/engines/handle.py", "import vllm.config", ["vllm.config"]),
        ("runtime/engines/elastic/pages.py", "import torch, vllm", []),
        ("runtime/events.py", "from runtime.engines import handle, fake", ["runtime.engines.fake"]),
        ("runtime/jobs/job.py", "from runtime.cli import main\nfrom . import batch", ["runtime.cli.main", "..batch"]),
        ("runtime/telemetry/host.py", "from pynvml import nvmlInit", ["pynvml.nvmlInit"]),
        ("runtime/cli/solve.py", "from runtime.jobs import job\nimport torch", ["torch"]),
        ("runtime/unheard_of.py", "import runtime.errors", ["runtime.errors"]),
    ],
)
def test_offences_are_found(path: str, source: str, wrong: list[str]) -> None:
    assert offences(path, source) == wrong


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = {"mcp", "numpy", "opentelemetry", "ray", "torch", "transformers", "vllm"}
    code = f"import sys, runtime.cli.main, runtime.cli.serve; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
