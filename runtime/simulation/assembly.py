"""A team over modelled engines in real time: a service without vLLM, to test clients and to measure everything but the
engines."""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from agents.arithmetic import oracle
from runtime.assembly import RunningTeam
from runtime.config import Config
from runtime.control.contained_policy import ContainedPolicies
from runtime.devices.handle import Publish
from runtime.engines.fake import Script
from runtime.engines.handle import EngineState
from runtime.engines.request import GenerateRequest
from runtime.events import EngineChanged, Listener, ignore
from runtime.jobs.team import Team
from runtime.simulation import load

KV_CACHE_BYTES = 64 << 20
MODEL = "embedded"


@asynccontextmanager
async def start_modelled_team(
    config: Config,
    team: Team,
    listener: Listener = ignore,
    publish: Publish = lambda record: None,
    time_scale: float = 1,
    model: str = MODEL,
    devices: int = 1,
    placed: Mapping[str, Collection[str]] | None = None,
    replica_bounds: Mapping[str, tuple[int, int]] | None = None,
    script: Script | None = None,
) -> AsyncIterator[RunningTeam]:
    """Start the embedded team over modelled engines, which always reply correctly, or with `script`.

    `time_scale` multiplies the modelled durations; with 0 the engines reply at once. Each of the `devices` has a
    replica of every engine, or of those that `placed` names for it. `replica_bounds` lets replicas change: see
    RunningTeam.
    """
    constants = load.read(model)
    scripts = dict.fromkeys(constants.engines, script or right_reply)
    async with load.devices(constants, scripts, KV_CACHE_BYTES, devices, time_scale, placed=placed) as started:
        with ContainedPolicies(config.control.policy, config.control.shadow) as policies:
            team = team.without_tools()
            running = RunningTeam(
                team,
                started,
                config.control,
                policies,
                listener=listener,
                publish=publish,
                replica_bounds=replica_bounds,
            )
            for name in running.engines:
                listener(EngineChanged(name, EngineState.READY, 0.0))
            async with running:
                yield running


def right_reply(request: GenerateRequest) -> str:
    """Return the oracle's reply to a role's chat, and echo anything else."""
    if request.rendered is None:
        message = request.messages[-1].content
    else:
        text = request.rendered.get("prompt") or " ".join(map(str, request.rendered["prompt_token_ids"]))
        message = str(text).removeprefix("<s>").removesuffix("<reply>")  # what the embedded chat template adds
    try:
        return oracle.reply(message)
    except (ValueError, LookupError, SyntaxError, AssertionError):
        return message
