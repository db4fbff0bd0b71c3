"""Connects the configured cluster."""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.cluster.agent import Agent, MakeAgent
from runtime.cluster.cluster import Cluster, OnWait
from runtime.cluster.plan import Common, Timeouts
from runtime.config import Config
from runtime.control.snapshotter import EngineRequirements
from runtime.engines.fleet import OnState
from runtime.engines.launcher import prepare_head
from runtime.engines.spec import EngineSpec
from runtime.errors import ConfigError


@asynccontextmanager
async def connected(
    config: Config,
    specs: Mapping[str, EngineSpec],
    may_sleep: Collection[str],
    requirements: Mapping[str, EngineRequirements],
    folder: Path,
    on_state: OnState,
    on_wait: OnWait,
    make_agent: MakeAgent = Agent,
) -> AsyncIterator[Cluster]:
    """Connect to the Ray cluster of a configuration, start its agents and their engines, and stop them at the end.

    `make_agent` makes the agents. Raises ConfigError if Ray is not installed or the cluster cannot be used, and
    EngineError as Cluster does.
    """
    try:
        from runtime.cluster.ray_nodes import RayNodes
    except ImportError as error:
        raise ConfigError(
            f"{config.source}: cluster: Ray cannot be imported ({error}); install it: pip install 'troupe-llm[cluster]'"
        ) from None
    assert config.cluster is not None
    prepare_head(specs.values())
    timeouts = Timeouts(config.cluster.lost_s, config.cluster.orphan_s)
    common = Common.of(config, specs, may_sleep, requirements, timeouts)
    async with (
        RayNodes(config, make_agent) as nodes,
        Cluster(nodes, config, common, folder, on_state, on_wait) as cluster,
    ):
        yield cluster
