"""Stand-ins for what a test machine lacks: a scripted NVML, and a Python that installs nothing."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def nvml(folder: Path, lines: Mapping[str, object]) -> dict[str, str]:
    """Build the scripted NVML in a folder; the environment in which a process finds it instead of the driver's."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for NVML with")
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "nvml_stub.c"], check=True)
    script = folder / "nvml.txt"
    script.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
    return {"LD_LIBRARY_PATH": str(folder), "NVML_STUB": str(script)}
