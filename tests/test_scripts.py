"""The shell scripts in a tiny repository, with a stub of Python that installs nothing (stubs/python.sh)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "tests" / "stubs" / "python.sh"
GIB = 1024**3


FAKE_APT = """#!/bin/sh
echo "$*" >>"$STUB_RECORD.apt"
[ "$1" = install ] || exit 0
shift 3
for name in "$@"; do ln -sf /bin/true "$STUB_BIN/$name"; done
"""


class Tree:
    """A repository with little more than the scripts, at a path with a space in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a repository"
        self.record = folder / "pip-calls"
        (self.root / "scripts").mkdir(parents=True)
        for script in ("setup.sh", "launch.sh", "test.sh"):
            shutil.copy2(ROOT / "scripts" / script, self.root / "scripts")
        self.write("pyproject.toml", "[project]\n")
        self.write("scripts/constraints-cpu.txt", "# heading\nthing==2.0\n")
        self.write("scripts/constraints-cuda.txt", "torch==1.0\nthing==2.0\n")
        self.write("scripts/constraints-test.txt", "pytest==3.0\n")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def write(self, path: str, text: str) -> None:
        (self.root / path).write_text(text)

    def environment(self, extra: str = "cpu", **more: str) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("STUB_", "TROUPE_"))},
            "PYTHON": str(STUB),
            "STUB_PYTHON": sys.executable,
            "STUB_RECORD": str(self.record),
            "TROUPE_EXTRA": extra,
            **more,
        }

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "scripts" / script), *arguments],
            cwd=self.elsewhere,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell starts background tests with SIGINT ignored, and bash cannot trap an ignored signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (it takes no lock)
        )

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def launch(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("launch.sh", *(arguments or ("roles",)), **environment)

    def installed(self) -> list[str]:
        """Return the last argument of each call of pip since the last call of this method."""
        calls = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [call.split(" install ", 1)[1].rsplit("/", 1)[-1].split()[-1] for call in calls]

    def wait_for_pip(self, requirement: str) -> None:
        until = time.monotonic() + 60
        while not (self.record.exists() and requirement in self.record.read_text()):
            assert time.monotonic() < until, f"pip was never called for {requirement}"
            time.sleep(0.02)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


EVERYTHING = ["torch==1.0+cpu", "constraints-cpu.txt", "repository"]


def test_first_launch_installs_everything_and_runs_the_command(tree: Tree) -> None:
    result = tree.launch("solve", "1 + 2", "--x")
    assert (result.returncode, result.stdout) == (0, "troupe solve 1 + 2 --x\n")
    assert tree.installed() == EVERYTHING
    assert "installing PyTorch's CPU build" in result.stderr


def test_second_launch_installs_nothing(tree: Tree) -> None:
    tree.launch()
    tree.installed()
    result = tree.launch()
    assert (result.stdout, result.stderr, tree.installed()) == ("troupe roles\n", "", [])


def test_launch_without_arguments_solves_the_sample_problems(tree: Tree) -> None:
    result = tree.run("launch.sh")
    assert result.stdout == f"troupe solve --file {tree.root}/configs/problems/sample.jsonl\n"


@pytest.mark.parametrize("path", ["pyproject.toml", "scripts/constraints-cpu.txt", "scripts/constraints-cuda.txt"])
def test_changed_requirements_are_installed_again(tree: Tree, path: str) -> None:
    tree.launch()
    tree.installed()
    with (tree.root / path).open("a") as file:
        file.write("\nother==1.0\n")
    tree.launch()
    assert tree.installed() == EVERYTHING


def test_moved_repository_is_set_up_again(tree: Tree) -> None:
    tree.launch()
    tree.installed()
    tree.root = tree.root.rename(tree.root.with_name("other repository"))
    assert tree.launch().returncode == 0
    assert tree.installed() == EVERYTHING


def test_test_script_adds_its_tools_and_launch_keeps_them(tree: Tree) -> None:
    result = tree.run("test.sh")
    assert tree.installed() == [*EVERYTHING, "constraints-test.txt"]
    *checks, tests = result.stdout.splitlines()
    assert checks == ["ran ruff check .", "ran ruff format --check .", "ran mypy"]
    assert tests.startswith("ran pytest -n 2 ")
    tree.launch()
    assert tree.installed() == []


def test_test_script_after_launch_installs_only_its_tools(tree: Tree) -> None:
    tree.launch()
    tree.installed()
    assert tree.run("test.sh", "-k", "some thing").stdout == "ran pytest -k some thing\n"
    assert tree.installed() == ["constraints-test.txt"]


@pytest.mark.parametrize("root", [True, False])
def test_test_script_installs_programs_if_it_is_root(tree: Tree, root: bool) -> None:
    bin_ = tree.elsewhere / "bin"
    bin_.mkdir()
    for name, text in {"apt-get": FAKE_APT, "id": f"#!/bin/sh\necho {0 if root else 1000}\n"}.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    setup = tree.root / "scripts" / "setup.sh"
    setup.write_text(setup.read_text().replace('"mosquitto chromium"', '"a-broker a-browser"'))
    environment = {"PATH": f"{bin_}:{os.environ['PATH']}", "STUB_BIN": str(bin_)}
    first = tree.run("test.sh", **environment)
    assert first.returncode == 0, first.stderr
    record = tree.record.with_name(f"{tree.record.name}.apt")
    if root:
        installed = ["update -q", "install -qy --no-install-recommends a-broker a-browser"]
        assert record.read_text().splitlines() == installed
        assert "installing a-broker a-browser" not in tree.run("test.sh", **environment).stderr
        assert record.read_text().splitlines() == installed
    else:
        assert "some tests will be skipped" in first.stderr
        assert not record.exists()


def test_pytorch_index_is_used_only_if_pip_finds_no_cpu_build(tree: Tree) -> None:
    result = tree.launch(STUB_FAIL=":all: --no-deps torch==")
    calls = tree.record.read_text().splitlines()
    assert result.returncode == 0
    assert ["--extra-index-url https://download.pytorch.org/whl/cpu" in call for call in calls[:2]] == [False, True]
    assert not any("extra-index" in call for call in calls[2:])


def test_cuda_never_uses_the_cpu_index(tree: Tree) -> None:
    tree.launch(extra="cuda")
    assert tree.installed() == ["constraints-cuda.txt", "repository"]


NO_CPU_TORCH = {"STUB_FAIL": "torch==1.0+cpu", "STUB_SAYS": "ERROR: No matching distribution found for torch==1.0+cpu"}
FALLBACK = ["torch==1.0", "constraints-cpu.txt", "repository"]


def test_plain_torch_is_installed_if_there_is_no_cpu_build(tree: Tree) -> None:
    result = tree.launch(**NO_CPU_TORCH)
    assert (result.returncode, result.stdout) == (0, "troupe roles\n")
    first, with_index, plain, *rest = tree.record.read_text().splitlines()
    assert first.endswith("torch==1.0+cpu")
    assert with_index.endswith("torch==1.0+cpu")
    assert plain.endswith(f"-c {tree.root}/scripts/constraints-cuda.txt torch==1.0")
    assert "--no-deps" not in plain
    assert all("--no-deps" in call for call in rest)
    assert tree.installed()[2:] == FALLBACK
    # Before the download, the script says what it downloads, how much, and how to get the small build.
    message = result.stderr.partition("installing torch==1.0 and CUDA's libraries")[0]
    assert "no torch==1.0+cpu" in message
    assert "GB to download" in message
    assert "remove" in message
    assert "pip says" not in result.stderr

    again = tree.launch()
    assert (again.stdout, again.stderr, tree.installed()) == ("troupe roles\n", "", [])


@pytest.mark.parametrize("interrupted_at", ["constraints-cuda.txt", "constraints-cpu.txt"])
def test_interrupted_fallback_resumes_as_fallback(tree: Tree, interrupted_at: str) -> None:
    process = tree.start("launch.sh", "roles", STUB_HANG=interrupted_at, **NO_CPU_TORCH)
    tree.wait_for_pip(interrupted_at)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    tree.installed()
    assert tree.launch().returncode == 0
    assert tree.installed() == FALLBACK


def test_new_environment_tries_the_cpu_build_again(tree: Tree) -> None:
    tree.launch(**NO_CPU_TORCH)
    shutil.rmtree(tree.root / ".venv")
    tree.installed()
    tree.launch()
    assert tree.installed() == EVERYTHING


def test_failed_fallback_tries_the_cpu_build_again(tree: Tree) -> None:
    """Without a network, pip also reports that there is no such build."""
    assert tree.launch(STUB_FAIL="torch==1.0", STUB_SAYS=NO_CPU_TORCH["STUB_SAYS"]).returncode == 1
    tree.installed()
    assert tree.launch().returncode == 0
    assert tree.installed() == EVERYTHING


def test_cpu_build_that_fails_to_install_is_not_replaced(tree: Tree) -> None:
    result = tree.launch(STUB_FAIL="torch==1.0+cpu", STUB_SAYS="ERROR: No space left on device")
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert tree.installed() == ["torch==1.0+cpu"] * 2
    assert tree.launch().returncode == 0
    assert tree.installed() == EVERYTHING


def test_fallback_needs_more_disk(tree: Tree) -> None:
    df = tree.elsewhere / "df"
    df.write_text(f"#!/bin/sh\nprintf 'heading\\ndisk 0 0 {9 * GIB} 0%% /\\n'\n")
    df.chmod(0o755)
    path = f"{tree.elsewhere}:{os.environ['PATH']}"
    result = tree.launch(PATH=path, **NO_CPU_TORCH)
    assert result.returncode == 1
    assert "has 9 GiB free" in result.stderr
    assert tree.installed() == ["torch==1.0+cpu"] * 2
    shutil.rmtree(tree.root / ".venv")
    assert tree.launch(PATH=path).returncode == 0


def test_failure_shows_the_log_and_the_next_launch_resumes(tree: Tree) -> None:
    result = tree.launch(STUB_FAIL="constraints-cpu.txt")
    assert (result.returncode, result.stdout) == (1, "")
    assert "    pip says no\n" in result.stderr
    assert str(tree.root / ".venv" / "setup.log") in result.stderr
    tree.installed()
    assert tree.launch().returncode == 0
    assert tree.installed() == EVERYTHING


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_ends_pip_and_the_next_launch_resumes(tree: Tree, number: signal.Signals, code: int) -> None:
    process = tree.start("launch.sh", "roles", STUB_HANG="constraints-cpu.txt")
    tree.wait_for_pip("constraints-cpu.txt")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again to resume" in err
    tree.installed()
    assert tree.launch().returncode == 0  # pip has ended: it would hold the lock for 600 s
    assert tree.installed() == EVERYTHING


def test_constraints_that_change_during_installation_are_installed_again(tree: Tree) -> None:
    process = tree.start("launch.sh", "roles", STUB_PAUSE="constraints-cpu.txt")
    tree.wait_for_pip("constraints-cpu.txt")
    tree.write("scripts/constraints-cpu.txt", "thing==2.0\nother==1.0\n")
    process.communicate(timeout=60)
    tree.installed()
    tree.launch()
    assert tree.installed() == EVERYTHING


def test_launch_after_kill_waits_for_the_orphaned_pip(tree: Tree) -> None:
    process = tree.start("launch.sh", "roles", STUB_HANG="torch==")
    tree.wait_for_pip("torch==")
    process.kill()
    process.wait()
    second = tree.start("launch.sh", "roles")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    end_session(process.pid)
    out, _ = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, "troupe roles\n")
    assert tree.installed() == ["torch==1.0+cpu", *EVERYTHING]


def end_session(session: int) -> None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(rest[3]) == session:
            os.kill(pid, signal.SIGKILL)


def test_concurrent_launches_install_once(tree: Tree) -> None:
    both = [tree.start("launch.sh", "roles") for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in results] == ["troupe roles\n"] * 2
    assert tree.installed() == EVERYTHING


@pytest.mark.parametrize("missing", ["bin/python", "pyvenv.cfg"])
def test_incomplete_environment_is_recreated(tree: Tree, missing: str) -> None:
    tree.launch()
    (tree.root / ".venv" / missing).unlink()
    (tree.root / ".venv" / "stale").touch()
    tree.installed()
    assert "making a new one" in tree.launch().stderr
    assert not (tree.root / ".venv" / "stale").exists()
    assert tree.installed() == EVERYTHING


def test_other_extra_recreates_the_environment(tree: Tree) -> None:
    tree.launch(extra="cuda")
    tree.installed()
    assert "making a new one" in tree.launch().stderr
    assert tree.installed() == EVERYTHING


def test_leftovers_of_a_killed_pip_are_removed(tree: Tree) -> None:
    tree.launch()
    site = tree.root / ".venv/lib/python3.11/site-packages"
    for path, text in {"whole.dist-info/RECORD": "x", "half.dist-info/METADATA": "x", "~orch/x.py": "x"}.items():
        (site / path).parent.mkdir(parents=True)
        (site / path).write_text(text)
    tree.write("pyproject.toml", "changed")
    tree.launch()
    assert [path.name for path in site.iterdir()] == ["whole.dist-info"]


def test_old_python_is_refused_before_anything_is_created(tree: Tree, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18 && exit\nexit 1\n')
    old.chmod(0o755)
    result = tree.launch(PYTHON=str(old))
    assert result.returncode == 1
    assert "Python 3.11 to 3.14 is needed" in result.stderr
    assert "Python 3.9.18" in result.stderr
    assert not (tree.root / ".venv").exists()


def test_unknown_extra_is_refused(tree: Tree) -> None:
    assert "set it to cpu or cuda" in tree.launch(extra="rocm").stderr


# The checks of setup.sh, each with its facts as arguments


def check(call: str, *arguments: str) -> str:
    """Return what a function of setup.sh reports, or nothing if its check passes."""
    script = f'source "$0"; {call} "$@"'
    command = ["bash", "-c", script, str(ROOT / "scripts" / "setup.sh"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (result.stderr == ""), result
    return result.stderr


@pytest.fixture
def fact(tmp_path: Path) -> Path:
    return tmp_path / "fact"


def test_require_disk() -> None:
    assert check("require_disk", "/srv", str(8 * GIB), str(8 * GIB)) == ""
    message = check("require_disk", "/srv", str(3 * GIB), str(8 * GIB))
    assert "/srv has 3 GiB free, but 8 GiB are needed" in message
    assert "to fix it: free some space" in message


def test_require_avx2(fact: Path) -> None:
    fact.write_text("flags : fpu sse4_2 avx2 bmi2\n")
    assert check("require_avx2", str(fact)) == ""
    fact.write_text("flags : fpu sse4_2 avx avx2x\n")
    assert "no AVX2" in check("require_avx2", str(fact))


@pytest.mark.parametrize(
    ("platform", "missing"),
    [
        (("Linux", "x86_64", "glibc 2.36"), ""),
        (("Linux", "x86_64", "glibc 2.31"), ""),
        (("Linux", "x86_64", "glibc 2.28"), "glibc 2.31"),
        (("Linux", "x86_64", ""), "not glibc"),
        (("Linux", "aarch64", "glibc 2.36"), "Linux on aarch64"),
        (("Darwin", "arm64", ""), "Darwin on arm64"),
    ],
)
def test_require_platform(platform: tuple[str, str, str], missing: str) -> None:
    message = check("require_platform", *platform)
    assert (missing in message) if missing else (message == "")


@pytest.mark.parametrize(("version", "fits"), [("580.65.06", True), ("595.10", True), ("535.183.01", False)])
def test_require_driver(fact: Path, version: str, fits: bool) -> None:
    fact.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Jan  1 00:00:00 UTC 2026\n")
    message = check("require_driver", str(fact))
    assert (message == "") is fits
    assert fits or f"the NVIDIA driver is {version}" in message


def test_require_venv(fact: Path) -> None:
    fact.write_text("#!/bin/sh\nexit 1\n")
    fact.chmod(0o755)
    assert "apt-get install python3-venv" in check("require_venv", str(fact))
    assert check("require_venv", sys.executable) == ""


def test_installed_packages_need_no_disk(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(GIB // 1024))
    command = ["bash", "-c", 'source "$0"; needed_bytes cpu "$1"', str(ROOT / "scripts" / "setup.sh"), str(tmp_path)]
    needed = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 8 * GIB - 2 * 1024**2 < needed <= 8 * GIB - GIB // 1024


def test_foreign_environment_is_not_touched(tree: Tree) -> None:
    (tree.root / ".venv").mkdir()
    (tree.root / ".venv" / "mine").touch()
    refused = tree.launch()
    assert refused.returncode == 1
    assert "was not made by this script" in refused.stderr
    assert [path.name for path in (tree.root / ".venv").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "script", ["measure.py", "measure_service.py", "drill_service.py", "drill_residency.py", "service_harness.py"]
)
def test_measuring_script_shows_its_help(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--help"]
    assert f"python scripts/{script}" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
