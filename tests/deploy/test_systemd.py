"""The systemd unit."""

import re
import subprocess
from pathlib import Path

from runtime import config
from tests.deploy.files import DEPLOY, UNIT, needs_program

INSTALLED = "/opt/troupe/.venv/bin/troupe"


def values(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_unit_runs_the_command_that_the_readme_installs() -> None:
    readme = (DEPLOY / "README.md").read_text()
    assert values("ExecStart") == [f"{INSTALLED} serve --config /etc/troupe/team.yaml"]
    assert INSTALLED in readme
    assert "/etc/troupe/team.yaml" in readme
    assert values("User") == values("Group") == ["troupe"]
    [environment] = values("Environment")
    assert environment.split() == ["HOME=/var/lib/troupe", "TROUPE_HOME=/var/lib/troupe"]
    assert values("StateDirectory") == ["troupe"]
    assert "--home-dir /var/lib/troupe" in readme


def test_unit_waits_for_the_drain_of_the_service() -> None:
    [timeout] = values("TimeoutStopSec")
    assert int(timeout.removesuffix("s")) >= config.load("embedded").service.drain_s + 30
    assert values("KillMode") == ["mixed"]  # otherwise, SIGTERM would end the engines under the running jobs


@needs_program("systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(INSTALLED, "/bin/true"))  # it has to exist
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, []), done.stderr
