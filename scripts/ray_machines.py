"""A Ray cluster whose nodes are processes of this machine, to measure and to kill."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Nodes read these when they start.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # whatever its name says: all nodes are on 127.0.0.1
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

import psutil
from ray._private import ray_constants
from ray.cluster_utils import Cluster as RayCluster

from runtime import config
from runtime.config import Cluster, Config
from runtime.engines.spec import ReplicaRange

ray_constants.ENABLE_RAY_CLUSTER = False  # the same for this process, which may have imported Ray before

SMALL: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
NODE = "troupe-node"
"""The resource of the nodes that run agents. Ray's own head node has none."""


class Machines:
    """A Ray cluster with nodes of these names, as a context manager. Its head node runs no agent."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._nodes: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._cluster = RayCluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 0, "node_name": "head"})
        try:
            for name in self._names:
                self.add(name)
        except BaseException:
            self._shut_down()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self._nodes:
            self.send(name, signal.SIGCONT)  # Ray waits for frozen processes
        self._shut_down()

    def _shut_down(self) -> None:
        self._cluster.shutdown()  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        """The address of the cluster."""
        address: str = self._cluster.address
        return address

    def add(self, name: str) -> None:
        """Start a node."""
        self._nodes[name] = self._cluster.add_node(**SMALL, node_name=name, resources={NODE: 1})

    def forget(self, name: str) -> None:
        """Clean up after a node that was killed, so that another one can have its name."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the processes of a node: its raylet, and everything that it has started."""
        with suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(self._nodes[name].all_processes["raylet"][0].process.pid)
            return [raylet, *raylet.children(recursive=True)]
        return []

    def agents(self, name: str) -> list[psutil.Process]:
        """Return the processes of the agents on a node."""
        return [process for process in self.processes(name) if "_RayAgent" in " ".join(process.cmdline())]

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a node."""
        for process in self.processes(name):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def on_cluster(address: str, replicas: int | str | ReplicaRange = "all", **cluster: Any) -> Config:
    """Return the embedded team's configuration on a Ray cluster, with so many replicas of each engine."""
    found = config.load("embedded")
    engines = {name: spec.model_copy(update={"replicas": replicas}) for name, spec in found.engines.items()}
    chosen = Cluster(address=address, nodes_with=None if address == "local" else NODE, **cluster)
    return found.model_copy(update={"cluster": chosen, "engines": engines})
