"""Stubs for what a test machine lacks: a scripted NVML, CUDA's memory calls, and a Python that installs nothing."""

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def build(source: str, library: Path) -> Path:
    """Compile a stub unless the library exists, and return the library. Skip the test if there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip(f"no C compiler to build {source} with")
    if not library.exists():
        soname = f"-Wl,-soname,{library.name}"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", soname, "-o", library, HERE / source, "-ldl"], check=True)
    return library


def nvml(folder: Path, lines: Mapping[str, object]) -> dict[str, str]:
    """Build the scripted NVML in a folder, with `lines` as its script.

    Return the environment variables with which a process loads it instead of the driver's library.
    """
    build("nvml_stub.c", folder / "libnvidia-ml.so.1")
    script = folder / "nvml.txt"
    script.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
    return {"LD_LIBRARY_PATH": str(folder), "NVML_STUB": str(script)}


def cuda(folder: Path) -> ctypes.CDLL:
    """Build and load the stub of the CUDA driver. cuda-bindings finds it by its name if imported afterwards."""
    return ctypes.CDLL(str(build("cuda_stub.c", folder / "libcuda.so.1")), mode=ctypes.RTLD_GLOBAL)
