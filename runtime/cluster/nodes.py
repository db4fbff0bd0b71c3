"""The interface to the nodes of a cluster. `ray_nodes` has the one for Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from runtime.cluster.link import AgentHandle


@dataclass(frozen=True)
class Node:
    """A place where an agent runs. Names of nodes are unique, and a node that comes back keeps its name.

    - `key`: names this start of the node.
    - `prefix`: begins the names of its devices.
    - `devices`: the numbers of the GPUs of each of its devices; None if the configuration's are to be looked for there.
    """

    name: str
    key: str
    prefix: str = ""
    devices: Mapping[str, tuple[int, ...]] | None = None


NODES_S = 600.0
"""Longest wait for nodes that an autoscaler was asked for, in seconds."""


class Nodes(Protocol):
    """The nodes of a cluster that are alive, and their agents."""

    async def alive(self) -> list[Node]:
        """Return the nodes that can run an agent now."""

    async def with_agents(self) -> set[str]:
        """Return the names of the nodes on which an agent runs."""

    async def agent(self, node: Node) -> tuple[AgentHandle, bool]:
        """Return the agent of a node, and whether this call has created it because none ran.

        Raises Unreachable if that fails. If this is cancelled, it leaves no new agent behind.
        """
