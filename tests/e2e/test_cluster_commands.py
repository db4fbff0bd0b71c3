"""The commands on a Ray cluster with real engines."""

import json
import signal

import httpx
import psutil
import pytest

from scripts.ray_machines import NODE, Machines
from tests.e2e.conftest import LONG_S, Command, wait_until
from tests.e2e.test_serve import Service

pytestmark = pytest.mark.e2e

PROBLEM = "(12+7)*3-(45-5)"
LOCAL = """
extends: embedded
cluster: {address: local}
devices: [0, 1]
device: {memory_bytes: 2GiB}
engines:
  solver: {replicas: all}
"""
PATIENT_S = 5.0
"""A busy machine can hold a process up for seconds, which is no loss."""


def test_solve_on_a_local_cluster_leaves_nothing_behind(troupe: Command) -> None:
    (troupe.folder / "local.yaml").write_text(LOCAL)
    solved = troupe.run("solve", PROBLEM, "--config", "local.yaml", "--json")
    assert solved.returncode == 0, solved.stderr
    assert json.loads(solved.stdout.splitlines()[-1])["answer"] == "17"
    troupe.nothing_left()


def test_a_service_that_was_killed_takes_its_engines_over(troupe: Command) -> None:
    with Machines("a") as machines:
        team = (
            f"extends: embedded\ncluster: {{address: '{machines.address}', nodes_with: {NODE}, lost_s: {PATIENT_S}}}\n"
        )
        (troupe.folder / "team.yaml").write_text(team)
        service = Service(troupe, "--config", "team.yaml")
        engines = _engines(machines)
        assert len(engines) == 3
        accepted = [
            httpx.post(f"{service.url}/jobs", json={"problem": PROBLEM}, timeout=LONG_S).json()["id"] for _ in range(40)
        ]
        service.kill()
        service.start()
        assert _engines(machines) == engines
        wait_until(lambda: all(service.jobs()[job]["state"] == "done" for job in accepted))
        assert {service.jobs()[job]["result"]["answer"] for job in accepted} == {"17"}
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(LONG_S) == 0
        wait_until(lambda: not _engines(machines))
        assert machines.agents("a") == []


def _engines(machines: Machines) -> list[psutil.Process]:
    return sorted(
        (process for process in machines.processes("a") if "EngineCore" in "".join(process.cmdline())),
        key=lambda process: process.pid,
    )
