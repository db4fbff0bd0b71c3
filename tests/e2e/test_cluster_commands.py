"""The commands on a Ray cluster with real engines."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys

import httpx
import psutil
import pytest

from scripts.ray_autoscaler import SETTINGS, Autoscaled
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


def test_a_local_cluster_listens_on_localhost_only(troupe: Command) -> None:
    (troupe.folder / "local.yaml").write_text("extends: embedded\ncluster: {address: local}\n")
    for name in [name for name in troupe.environment if name.startswith("RAY_")]:  # as a user's shell
        del troupe.environment[name]
    service = Service(troupe, "--config", "local.yaml")
    reached = set()
    for process in troupe.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            reached |= {each.laddr.ip for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(LONG_S) == 0
    assert reached <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, reached
    troupe.nothing_left()


@pytest.mark.parametrize("asks", [True, False])
def test_an_open_cluster_is_refused_whatever_this_process_has(troupe: Command, asks: bool) -> None:
    mode = {"RAY_AUTH_MODE": "token" if asks else "disabled", "RAY_AUTH_TOKEN": "a" * 32}
    troupe.environment |= mode | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_TMPDIR": "/tmp"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [*ray, "start", "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=1", "--block"]
    head = subprocess.Popen(
        [*start, "--object-store-memory=80000000"], env=troupe.environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert head.stdout is not None
        address = next(found.group(1) for line in head.stdout if (found := re.search(r"--address='([^']+)'", line)))
        troupe.environment |= {"RAY_AUTH_MODE": "token"}
        (troupe.folder / "team.yaml").write_text(f"extends: embedded\ncluster: {{address: '{address}'}}\n")
        solved = troupe.run("solve", PROBLEM, "--config", "team.yaml")
        if asks:
            assert solved.returncode == 0, solved.stderr
        else:
            assert solved.returncode == 2
            assert "asks for no token" in solved.stderr
    finally:
        head.terminate()
        head.wait(LONG_S)


def test_the_autoscaler_adds_the_nodes_that_a_team_asks_for_and_ends_them_afterwards(troupe: Command) -> None:
    with Autoscaled(most=3) as cluster:
        team = f"""
            extends: embedded
            cluster: {{address: '{cluster.address}', nodes_with: {NODE}, nodes: 2, lost_s: {PATIENT_S}, orphan_s: 20}}
            engines: {{solver: {{replicas: 2}}}}
        """
        (troupe.folder / "team.yaml").write_text(team)
        troupe.environment |= SETTINGS
        for end, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):  # its agents outlive the second one
            serving = troupe.start("serve", "--port", 0, "--json", "--config", "team.yaml")
            assert serving.stdout is not None
            events = []
            for line in serving.stdout:
                events.append(json.loads(line))
                if events[-1]["event"] == "ready":
                    break
            assert {"event": "waiting", "nodes": 0, "wanted": 2} in events
            url = next(event["url"] for event in events if event["event"] == "listening")
            # On a busy machine, Ray takes a slow node for a lost one, and starts another.
            assert 2 <= len(httpx.get(f"{url}/devices", timeout=LONG_S).json()) <= 3
            serving.send_signal(end)
            assert serving.wait(LONG_S) == code
            wait_until(lambda: cluster.nodes() == 0)


def test_a_service_that_was_killed_takes_its_engines_over(troupe: Command) -> None:
    with Machines("a") as machines:
        team = (
            f"extends: embedded\ncluster: {{address: '{machines.address}', nodes_with: {NODE}, lost_s: {PATIENT_S}}}\n"
        )
        (troupe.folder / "team.yaml").write_text(team)
        service = Service(troupe, "--config", "team.yaml")
        wait_until(lambda: len(_engines(machines)) == 3, 60, lambda: _processes(machines))
        engines = _engines(machines)
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


def _processes(machines: Machines) -> list[dict[str, object]]:
    """Return what runs below the node, and every engine of this machine."""
    kept = {process.pid for process in machines.processes("a")}
    return [
        process.info
        for process in psutil.process_iter(["pid", "ppid", "create_time", "cmdline"])
        if process.pid in kept or "EngineCore" in "".join(process.info["cmdline"] or ())
    ]


def _engines(machines: Machines) -> list[psutil.Process]:
    return sorted(
        (process for process in machines.processes("a") if "EngineCore" in "".join(process.cmdline())),
        key=lambda process: process.pid,
    )
