"""Agents on the nodes of a Ray cluster. The only module that imports Ray."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import ip_address
from typing import Any, Self, TypeVar

import ray
from ray._private import ray_constants, worker
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runtime.cluster.agent import Agent, MakeAgent
from runtime.cluster.cluster import ATTACH_S
from runtime.cluster.link import AgentHandle, Unreachable
from runtime.cluster.nodes import NODES_S, Node
from runtime.config import Cluster as ClusterChoice
from runtime.config import Config
from runtime.devices.selection import select
from runtime.engines import temp_folder
from runtime.engines.vllm_import import import_with_vllm
from runtime.errors import ConfigError, EngineError, TroupeError

_PROBE = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, 10)"
CALLS_AT_ONCE = 100_000
AGENT = "agent "
"""Prefix of an agent's name in Ray, before the name and the key of its node."""
RENEW_S = 10.0
"""Seconds after which a request for nodes is sent again."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 would be inherited by every engine
    "RAY_worker_oom_score_adjustment": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill an agent when the host's memory is 95% full
}
"""Settings for the nodes that this process starts. Others are started by their users: see the README."""
CONNECT_S = 5.0
"""Timeout of a first connection to the cluster, in seconds."""
OWN_STORE_BYTES = 100 << 20
"""The memory for objects of a cluster that this process starts. Ray takes a third of the machine's by default."""
SESSION_BYTES = len("/session_2026-11-30_09-52-05_478080_4194304/sockets/plasma_store")
"""The length of the path of Ray's sockets in its folder."""
T = TypeVar("T")


class RayNodes:
    """The nodes of the configured Ray cluster, as an async context manager that connects to it.

    `make_agent` makes the agent of a node, given its name and what to call when it has ended without a head.
    Entering raises ConfigError if the cluster cannot be used.
    """

    def __init__(self, config: Config, make_agent: MakeAgent = Agent) -> None:
        assert config.cluster is not None
        self._make_agent = make_agent
        self._named_twice: set[str] = set()
        self._request = _NodeRequest(config.cluster)
        self._config = config
        self._cluster: ClusterChoice = config.cluster
        # Ray does not restart it, because that would begin its calls anew.
        self._actors: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_RayAgent)

    async def __aenter__(self) -> Self:
        with ExitStack() as owned:
            # Ray's sessions, with logs and sockets, of a cluster that this process starts.
            self._temporary = owned.enter_context(temp_folder.folder(SESSION_BYTES))
            owned.callback(ray.shutdown)
            await asyncio.to_thread(self._connect)
            _take_signals_back()
            self._check_open()
            owned.callback(self._request.end)
            self._owned = owned.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self._owned.close)

    def _connect(self) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of outboxes that end when this head goes
        self._check_reachable()
        worker.print_to_stdstream = _log  # what Ray says about lost nodes would mix with a command's output
        local = self._cluster.address == "local"
        if local:  # nothing of a cluster on this machine alone may listen beyond it
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False  # Ray has read the variable already
        own: dict[str, Any] = {
            "include_dashboard": False,
            "num_gpus": 0,
            "object_store_memory": OWN_STORE_BYTES,
            "_temp_dir": str(self._temporary),
        }
        try:
            ray.init(
                address=self._cluster.address,
                namespace=self._cluster.namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if local else {}),
            )
        except (RayError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise self._unusable(error) from None

    def _check_reachable(self) -> None:
        """Raise ConfigError if nothing listens at the address. Ray would try for minutes."""
        host, colon, port = self._cluster.address.rpartition(":")
        if not colon or not port.isdecimal():
            return
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self._config.source}: cluster.address: the Ray cluster {self._cluster.address!r} cannot be used: "
            f"{_first_line(error)}; start one with `ray start --head`, or use the address local"
        )

    def _check_open(self) -> None:
        """Raise ConfigError if others can reach the cluster without a token, unless `cluster.open` is true."""
        addresses = [node["NodeManagerAddress"] for node in _listed()]
        reached = next((address for address in addresses if not _is_loopback(address)), None)
        if reached is None or self._cluster.open:
            return
        if self._cluster.address == "local" or not _asks_for_token(ray.get_runtime_context().gcs_address):
            raise ConfigError(
                f"{self._config.source}: cluster: the Ray cluster listens at {reached} and asks for no token, so "
                "anyone who can reach it can run code; start every node with RAY_AUTH_MODE=token, or set cluster.open "
                "to true if you alone use the network"
            )

    async def alive(self) -> list[Node]:
        """Return the nodes that can run an agent, except nodes that share a name."""
        try:
            found = await asyncio.to_thread(self._renew)
        except RayError as error:
            raise EngineError(f"the nodes of the Ray cluster cannot be listed: {_first_line(error)}") from None
        if self._cluster.address == "local":
            return await self._parts(found[0]["NodeID"]) if found else []
        names = [node["NodeName"] for node in found]
        for name in {name for name in names if names.count(name) > 1} - self._named_twice:
            self._named_twice.add(name)
            logging.getLogger(__name__).warning(
                "two nodes of the Ray cluster are called %s, and neither is used until one is gone; start each with a "
                "name of its own: ray start --node-name=NAME",
                name,
            )
        return [
            Node(name, node["NodeID"], f"{name}:")
            for name, node in zip(names, found, strict=True)
            if names.count(name) == 1
        ]

    def _renew(self) -> list[dict[str, Any]]:
        """Renew the request for nodes. Return those that have the configured resource, as Ray describes them."""
        needed = self._cluster.nodes_with
        found = [node for node in _listed() if needed is None or node["Resources"].get(needed)]
        self._request.renew([node["Resources"][needed] for node in found] if needed else [])
        return found

    async def _parts(self, key: str) -> list[Node]:
        """Return this machine as one node for each device, so that each has an agent of its own."""
        gpus: tuple[int, ...] = ()
        if self._config.devices != (0,):
            vllm_engine = await asyncio.to_thread(import_with_vllm, "runtime.engines.vllm_engine")
            gpus = vllm_engine.visible_gpus()
        found = select(self._config, gpus)
        return [Node(f"device {name}", key, devices={name: numbers}) for name, numbers in found.items()]

    async def with_agents(self) -> set[str]:
        """Return the names of the nodes on which an agent runs."""
        try:
            names = await asyncio.to_thread(list_named_actors)
        except RayError as error:
            raise EngineError(f"the agents of the Ray cluster cannot be listed: {_first_line(error)}") from None
        return {name.removeprefix(AGENT).rpartition(" ")[0] for name in names if name.startswith(AGENT)}

    async def agent(self, node: Node) -> tuple[AgentHandle, bool]:
        """Return the agent of a node, and whether this call has created it because none ran.

        Raises Unreachable if that fails. If this is cancelled, it leaves no new agent behind.
        """
        finding = asyncio.create_task(asyncio.to_thread(self._agent, node))
        try:
            return await asyncio.shield(finding)
        except asyncio.CancelledError:
            await asyncio.wait([finding], timeout=CONNECT_S)
            if finding.done() and not finding.exception():
                agent, created = finding.result()
                if created:
                    agent.kill()
            raise

    def _agent(self, node: Node) -> "tuple[_Handle, bool]":
        name = f"{AGENT}{node.name} {node.key}"
        try:
            with suppress(ValueError):  # there is none
                return _Handle(ray.get_actor(name)), False
            made = self._actors.options(
                name=name,
                lifetime="detached",
                max_concurrency=CALLS_AT_ONCE,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.key, soft=False),
            )
            arguments = (self._make_agent, node.name, self._cluster.orphan_s, self._cluster.nodes is not None)
            try:
                return _Handle(made.remote(*arguments)), True
            except ValueError:  # another head has just created one
                return _Handle(ray.get_actor(name)), False
        except (RayError, ValueError) as error:
            raise Unreachable(f"its agent cannot be started: {_first_line(error)}") from None


class _NodeRequest:
    """The team's request to Ray's autoscaler for nodes.

    It is a list of resources, one for each node: all that the node has of a resource, so that no two share a node.

    - Ray keeps one list for the whole cluster, in memory, until the next one comes. So it is sent again and again.
    - Ray ignores a list of which a part fits no node. So a missing node is taken to be as small as the smallest one
      there, and after NODES_S it is no longer asked for.
    """

    def __init__(self, cluster: ClusterChoice) -> None:
        self._resource, self._count = cluster.nodes_with or "", cluster.nodes or 0
        self._lock = threading.Lock()
        self._sent: list[dict[str, float]] = []
        self._sent_s = self._complete_s = time.monotonic()
        self._ended = False

    def renew(self, found: list[float]) -> None:
        """Ask for the nodes that have these amounts of the resource, and for those that are missing."""
        now_s = time.monotonic()
        with self._lock:
            if self._ended or not self._count:
                return
            if len(found) >= self._count:
                self._complete_s = now_s
            missing = self._count - len(found) if now_s < self._complete_s + NODES_S else 0
            amounts = sorted(found, reverse=True)[: self._count] + [min(found, default=1)] * missing
            bundles = [{self._resource: amount} for amount in amounts]
            if bundles != self._sent or now_s > self._sent_s + RENEW_S:
                self._sent, self._sent_s = bundles, now_s
                request_resources(bundles=bundles)

    def end(self) -> None:
        """Tell the autoscaler that this team needs no nodes any more."""
        with self._lock:
            self._ended = True
            if self._sent:
                _release_nodes()


def _release_nodes() -> None:
    with suppress(RayError, RuntimeError):
        request_resources(bundles=[])


class _RayAgent:
    """An agent as a Ray actor. It ends if no head attaches itself within `orphan_s`, or ATTACH_S if that is longer.

    With `asked_for_nodes`, it then withdraws the request for nodes, which the head that has gone cannot do.
    """

    def __init__(self, make_agent: MakeAgent, name: str, orphan_s: float, asked_for_nodes: bool) -> None:
        end = partial(_end, asked_for_nodes)
        self._agent = make_agent(name, end)
        self._alone = threading.Timer(max(orphan_s, ATTACH_S), end)
        self._alone.daemon = True
        self._alone.start()

    async def attach(self, head: str, wire_version: int) -> bytes:
        self._agent.host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        attached = await self._agent.attach(head, wire_version)
        self._alone.cancel()
        return attached

    async def gpus(self) -> list[int]:
        return await self._agent.gpus()

    async def start(self, plan: bytes) -> bytes:
        return await self._agent.start(plan)

    async def control(self, known: bytes) -> None:
        await self._agent.control(known)

    async def outbox(self, epoch: int) -> AsyncIterator[bytes]:
        async for data in self._agent.outbox(epoch):
            yield data

    async def take(self, epoch: int, number: int, data: bytes) -> None:
        await self._agent.take(epoch, number, data)

    async def close(self) -> None:
        await self._agent.close()


def _end(asked_for_nodes: bool) -> None:
    if asked_for_nodes:
        _release_nodes()
    os.kill(os.getpid(), signal.SIGTERM)


class _Handle:
    """A `_RayAgent` as an AgentHandle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def attach(self, head: str, wire_version: int) -> bytes:
        return await _answer(self._actor.attach.remote(head, wire_version))

    async def gpus(self) -> list[int]:
        return await _answer(self._actor.gpus.remote())

    async def start(self, plan: bytes) -> bytes:
        return await _answer(self._actor.start.remote(plan))

    async def control(self, known: bytes) -> None:
        await _answer(self._actor.control.remote(known))

    async def outbox(self, epoch: int) -> AsyncIterator[bytes]:
        try:
            async for item in self._actor.outbox.options(num_returns="streaming").remote(epoch):
                yield await item
        except RayError as error:
            raise _translated(error) from None

    def take(self, epoch: int, number: int, data: bytes) -> None:
        with suppress(RayError):
            self._actor.take.remote(epoch, number, data)

    async def close(self) -> None:
        await _answer(self._actor.close.remote())

    def kill(self) -> None:
        with suppress(RayError):
            ray.kill(self._actor)


async def _answer(reference: Awaitable[T]) -> T:
    """Wait for the answer of an actor. Raises Troupe's errors as they are, and Unreachable if the actor is gone."""
    try:
        return await reference
    except RayError as error:
        raise _translated(error) from None


def _translated(error: RayError) -> Exception:
    if not isinstance(error, RayTaskError):
        return Unreachable(_first_line(error))
    return error.cause if isinstance(error.cause, TroupeError) else EngineError(_first_line(error.cause))


def _asks_for_token(address: str) -> bool:
    """Return True if the cluster refuses a client without a token. This process may have one, so another one asks."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", _PROBE, address]
    asked = subprocess.run(
        command, env=environment | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, check=False
    )
    return asked.returncode != 0 and "token" in asked.stderr.lower()


def _take_signals_back() -> None:
    """Install this process's handler of SIGTERM again, which Ray has replaced by one that prints a stack."""
    if threading.current_thread() is threading.main_thread() and (handler := signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, handler)


def _log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    del ignore_prefix
    logging.getLogger("ray").warning("%s: %s", data.get("pid"), "\n".join(map(str, data["lines"])))


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _listed() -> list[dict[str, Any]]:
    """Return Ray's descriptions of the nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
