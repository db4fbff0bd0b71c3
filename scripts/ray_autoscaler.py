"""A Ray cluster whose autoscaler starts and ends nodes, as processes of this machine."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import psutil
from ray._private import parameter
from ray.autoscaler._private.fake_multi_node import node_provider

from scripts.ray_machines import NODE, ROOT

HEAD = node_provider.FAKE_HEAD_NODE_ID
SETTINGS = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
}


class NamedNodes(node_provider.FakeMultiNodeProvider):
    """Ray's provider of nodes on one machine. It gives each node a name of its own, as clouds do."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        named = partial(parameter.RayParams, node_name=f"box-{self._next_node_id + 1}")
        with patch.object(parameter, "RayParams", named):
            super()._create_node_with_resources_and_labels(*arguments)  # type: ignore[no-untyped-call]


class Autoscaled:
    """A Ray cluster without nodes for agents, as a context manager. Its autoscaler adds up to `most`, on request.

    A node that nothing needs is ended after `idle_s` seconds.
    """

    def __init__(self, most: int, idle_s: float = 3) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        resources = {"CPU": 1, NODE: 2, "object_store_memory": 80 << 20}
        box = {"resources": resources, "node_config": {}, "max_workers": most}
        provider = {
            "type": "external",
            "module": f"{NamedNodes.__module__}.{NamedNodes.__name__}",
            "gcs_address": self.address,
            "head_node_id": HEAD,
            "launch_multiple": True,
        }
        commands = ["setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands"]
        commands += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"]
        self._settings: dict[str, Any] = {
            "cluster_name": "machines",
            "max_workers": most,
            "provider": provider,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "head_node_type": "ray.head.default",
            "available_node_types": {"ray.head.default": head, "box": box},
            "idle_timeout_minutes": idle_s / 60,
            **{command: [] for command in commands},
        }

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
        settings = Path(self._folder.name) / "autoscaler.json"
        settings.write_text(json.dumps(self._settings))
        port = self.address.rpartition(":")[2]
        environment = os.environ | SETTINGS | {"PYTHONPATH": str(ROOT)}
        environment |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        start += ["--node-ip-address=127.0.0.1", "--num-cpus=0", "--include-dashboard=false", "--node-name=head"]
        start += ["--object-store-memory=80000000", f"--temp-dir={self._folder.name}"]
        self._head = subprocess.Popen(
            [*start, f"--autoscaling-config={settings}"], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self._head.stdout is not None
        if not any("Ray runtime started" in line for line in self._head.stdout):
            raise RuntimeError("Ray's head node did not start")
        return self

    def nodes(self) -> int:
        """Return the number of nodes that the autoscaler has started and not ended."""
        return sum(process.name() == "raylet" for process in self._processes()) - 1  # the head's own

    def _processes(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(self._folder.name in part for part in process.info["cmdline"] or ())
        ]

    def __exit__(self, *exc: object) -> None:
        self._head.terminate()
        self._head.wait()
        for process in self._processes():  # Ray's provider leaves the log monitors of its nodes behind
            process.kill()
        self._folder.cleanup()
