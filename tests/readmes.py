"""The rules by which the code blocks of READMEs run in tests.

A block is run by the language of its fence, in the order of the README, all in one new folder:

- `bash`: run with `bash -euo pipefail`. `troupe` and `python` are this environment's.
  The folder has `scripts` and `configs`.
- `python`: run as a program; written to a file, and not run, if the block has a name.
- `yaml` and `json`: parsed; written to a file if the block has a name.
- `text`: output; not run. A block without a language is an error.

An HTML comment on the line above the fence, invisible to readers, says more:

- `<!-- test: serve -->`: run it while `troupe serve` runs; `localhost:8000` in it becomes the service's address.
- `<!-- test: serve mqtt -->`: the same, with the embedded broker; `1883` in it becomes the broker's port.
- `<!-- test: file team.yaml -->`: write the block to this file; later blocks can use it.
- `<!-- test: skip REASON -->`: do not run it, for a reason that the reader can check (needs a GPU, installs packages).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from scripts.mosquitto import free_port

ROOT = Path(__file__).resolve().parents[1]
LONG_S = 600
"""Bounds waits for what takes seconds on an idle machine."""
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- test: (?P<test>.*?) -->\n *)?```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a README, and what its comment says."""

    line: int
    language: str
    text: str
    test: str

    @property
    def serves(self) -> bool:
        return self.test in ("serve", "serve mqtt")

    @property
    def needs_broker(self) -> bool:
        return self.test == "serve mqtt"

    @property
    def file(self) -> str | None:
        return self.test.removeprefix("file ").strip() if self.test.startswith("file ") else None

    @property
    def skipped(self) -> bool:
        return self.test.startswith("skip ")


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a README in order."""
    found = []
    for match in _BLOCK.finditer(text):
        indent = match["indent"]
        lines = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        found.append(Block(text.count("\n", 0, match.start()) + 1, match["language"], lines, match["test"] or ""))
    return found


@dataclass(frozen=True)
class Reader:
    """A new user in a new folder."""

    folder: Path
    environment: dict[str, str]

    def try_out(self, block: Block, ports: Mapping[str, str]) -> None:
        """Do what a reader would do with a block, with other ports; fail if it fails."""
        text = block.text
        for documented, actual in ports.items():
            text = text.replace(documented, actual)
        if block.file is not None:
            (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / block.file).write_text(text)
        match block.language:
            case "bash":
                commands = text.replace("bash scripts/", f"bash {ROOT}/scripts/")  # they set up the folder above them
                self._run(block, "bash", "-euo", "pipefail", "-c", commands)
            case "python" if block.file is None:
                program = self.folder / f"line_{block.line}.py"
                program.write_text(text)
                self._run(block, sys.executable, str(program))
            case "python":
                compile(text, block.file or "", "exec")
            case "yaml":
                yaml.safe_load(text)
            case "json":
                json.loads(text)
            case "text":
                pass
            case language:
                pytest.fail(f"line {block.line}: no rule for a block of language {language!r}")

    def _run(self, block: Block, *command: str) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=LONG_S, check=False
        )
        assert done.returncode == 0, f"line {block.line}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"

    @contextmanager
    def serving(self, with_broker: bool) -> Iterator[Mapping[str, str]]:
        """Run `troupe serve`. Once it is ready, yield its ports by the documented ones."""
        command = ["troupe", "serve", "--json", "--port", str(free_port())]
        mqtt_port = str(free_port())
        if with_broker:
            config = self.folder.parent / "mqtt.yaml"
            config.write_text(f"extends: embedded\nmqtt: {{port: {mqtt_port}}}\n")
            command += ["--config", str(config), "--mqtt", "embedded"]
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        ) as service:
            try:
                assert service.stdout is not None
                events = {said["event"]: said for said in _until_ready(service.stdout)}
                yield {"localhost:8000": events["listening"]["url"].removeprefix("http://"), "1883": mqtt_port}
            finally:
                service.terminate()


def _until_ready(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    for line in lines:
        said = json.loads(line)
        yield said
        if said["event"] == "ready":
            return
    pytest.fail("the service ended before it was ready")


def new_reader(folder: Path) -> Reader:
    """Return a reader in a new folder below `folder`, with `$TROUPE_HOME` beside it."""
    work = folder / "work"
    work.mkdir()
    for name in ("configs", "scripts"):
        (work / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TROUPE_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    return Reader(work, environment)


def readmes(*patterns: str) -> list[str]:
    """Return the Markdown files that match a pattern, relative to the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def try_out(path: str, folder: Path) -> None:
    """Run every block of a README, as a new user in a new folder would. Fail at the first that fails."""
    text = (ROOT / path).read_text()
    found = [block for block in blocks(text) if not block.skipped]
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(text)), (
        "a fence is not closed, or indented oddly"
    )
    reader = new_reader(folder)
    with ExitStack() as owned:
        ports: Mapping[str, str] = {}
        if any(block.serves for block in found):
            ports = owned.enter_context(reader.serving(any(block.needs_broker for block in found)))
        for block in found:
            reader.try_out(block, ports if block.serves else {})
