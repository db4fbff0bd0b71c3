"""The Dockerfile, without a container engine: its files, its installation step and its health check."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mosquitto import free_port
from tests.deploy.files import DEPLOY, ROOT, mounts, services
from tests.runtime.api.http.conftest import configured, service

STUB = ROOT / "tests" / "stubs" / "python.sh"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile and their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, _, arguments in (line.partition(" ") for line in lines)]


def arguments_of(name: str) -> list[str]:
    return [arguments for each, arguments in instructions() if each == name]


def environment() -> dict[str, str]:
    [text] = arguments_of("ENV")
    return dict(pair.split("=", 1) for pair in text.split())


def copied(before: str = "") -> list[str]:
    """Return the sources that are copied, in order: all, or those before the instruction that contains a text."""
    steps = instructions()
    end = next(at for at, (_, text) in enumerate(steps) if before in text) if before else len(steps)
    return [source for name, text in steps[:end] if name == "COPY" for source in text.split()[:-1]]


def test_context_holds_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(copied())
    assert all((ROOT / source).exists() for source in copied())


def test_service_is_not_root_and_its_state_is_in_the_volume() -> None:
    [user], [volume] = arguments_of("USER"), arguments_of("VOLUME")
    assert user == "troupe"
    assert {environment()[name] for name in ("HOME", "TROUPE_HOME")} == {volume}
    for variant in ("cpu", "cuda"):
        assert mounts(services(variant)["troupe"])[volume] == "troupe"


def test_image_serves_on_all_addresses_and_holds_no_token() -> None:
    [entry], [command] = arguments_of("ENTRYPOINT"), arguments_of("CMD")
    assert [*json.loads(entry), *json.loads(command)] == ["troupe", "serve", "--host", "0.0.0.0"]
    assert environment()["PATH"].startswith("/opt/troupe/.venv/bin:")
    assert arguments_of("EXPOSE") == ["8000"]
    assert "troupe-" not in (DEPLOY / "Dockerfile").read_text()


def test_image_is_for_cuda_by_default() -> None:
    assert arguments_of("ARG") == ["EXTRA=cuda", "CLUSTER=0"]
    assert all((ROOT / "scripts" / f"constraints-{extra}.txt").is_file() for extra in ("cpu", "cuda"))


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_installation_needs_no_file_that_is_copied_later(tmp_path: Path, extra: str) -> None:
    [step] = [text for name, text in instructions() if name == "RUN" and "set_up" in text]
    tree, tools = tmp_path / "troupe", tmp_path / "tools"
    tree.mkdir()
    tools.mkdir()
    for source in copied(before="set_up"):
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
        copy(ROOT / source, tree / source)
    _write_program(
        tools / "df", "printf 'heading\\ndisk 0 0 99000000000 0%% /\\n'"
    )  # this machine's disk does not matter
    record = tmp_path / "pip-calls"
    [shell] = arguments_of("SHELL")
    done = subprocess.run(
        [*json.loads(shell), step],
        cwd=tree,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("STUB_", "TROUPE_"))},
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": str(STUB),
            "STUB_PYTHON": sys.executable,
            "STUB_RECORD": str(record),
            "EXTRA": extra,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{tree}/scripts/constraints-{extra}.txt" in record.read_text()
    assert record.read_text().splitlines()[-1].endswith(f"-e {tree}")


async def test_health_check_tells_a_running_service_from_a_missing_one(tmp_path: Path) -> None:
    async with service(configured(tmp_path)) as served:
        assert await _health(int(served.url.rsplit(":", 1)[1])) == 0
    assert await _health(free_port()) != 0


async def _health(port: int) -> int:
    [text] = arguments_of("HEALTHCHECK")
    python, *arguments = json.loads(text.split("CMD ", 1)[1])
    assert python == "python"
    program = [argument.replace("8000", str(port)) for argument in arguments]
    process = await asyncio.create_subprocess_exec(sys.executable, *program, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()


def _write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
