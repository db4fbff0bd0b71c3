"""Agents of a cluster over modelled engines, to test and measure everything but the engines."""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from runtime.cluster.agent import Agent
from runtime.cluster.plan import Plan
from runtime.engines.fake import Processor, Script
from runtime.engines.fleet import Measured, OnState
from runtime.engines.handle import EngineHandle
from runtime.engines.replicas import engine_of
from runtime.engines.sharing import Sharing
from runtime.engines.spec import EngineSpec
from runtime.engines.supervised import SupervisedEngine
from runtime.simulation import load
from runtime.simulation.assembly import KV_CACHE_BYTES, MODEL, right_reply


@dataclass(frozen=True)
class ModelledFleet:
    """The modelled engines of one device: see Fleet."""

    engines: Mapping[str, EngineHandle]
    sharing: Sharing

    @property
    def supervised(self) -> dict[str, SupervisedEngine]:
        """Return the engines by name, typed as SupervisedEngine."""
        return {name: engine for name, engine in self.engines.items() if isinstance(engine, SupervisedEngine)}

    def add_absent(self, name: str, spec: EngineSpec, replica: Measured) -> None:
        """Do nothing: the model has the absent replicas from the beginning."""


def modelled_agent(
    name: str,
    on_orphaned: Callable[[], None] = lambda: None,
    time_scale: float = 1,
    model: str = MODEL,
    script: Script = right_reply,
) -> Agent:
    """Return an agent whose engines are modelled and reply with `script`. `time_scale` multiplies their durations."""
    return Agent(name, on_orphaned, partial(_start, time_scale, load.read(model), script))


async def _start(
    time_scale: float,
    model: load.Model,
    script: Script,
    node: str,
    plan: Plan,
    owned: AsyncExitStack,
    on_state: OnState,
) -> Mapping[str, ModelledFleet]:
    """Start the engines of a plan: see cluster.agent.start_engines."""
    del node
    fleets = {}
    front = Processor(1e9)  # the model's share of a front process; an agent is a process of its own
    for device in plan.devices:
        names = {engine_of(name): name for name in (*plan.placed[device], *plan.absent[device])}
        modelled = load.ModelledDevice(
            model, dict.fromkeys(model.engines, script), KV_CACHE_BYTES, time_scale, {}, front
        )
        placed = [engine_of(name) for name in plan.placed[device]]
        started = await modelled.start(owned, names, placed, on_state)
        fleets[device] = ModelledFleet(started.engines, started.sharing)
        for name, engine in started.engines.items():
            on_state(name, engine.state, 0.0)
    return fleets
