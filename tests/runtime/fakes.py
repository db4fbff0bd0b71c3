"""Fake engines that reply like flawless embedded models, or with errors that a test adds."""

import random
from collections.abc import Callable

from agents.arithmetic import oracle
from runtime import config
from runtime.engines.fake import FakeEngine, ServiceTime
from runtime.engines.handle import EngineHandle
from runtime.engines.request import GenerateRequest
from runtime.jobs.team import Team, assemble

Slip = Callable[[str, random.Random], str]
"""Changes a reply, or returns it unchanged."""


def embedded_team(workflow: str = "deliberate") -> Team:
    """Return the shipped team with the given workflow."""
    return assemble(config.load("embedded").with_workflow(workflow))


async def engines(slip: Slip = lambda text, rng: text, time_scale: float = 0) -> dict[str, EngineHandle]:
    """Start a fake planner, solver and critic. `slip` may change the solver's replies."""

    def script(name: str) -> Callable[[GenerateRequest], str]:
        def reply(request: GenerateRequest) -> str:
            text = oracle.reply(request.messages[-1].content)
            return slip(text, random.Random(request.seed)) if name == "solver" else text

        return reply

    handles: dict[str, EngineHandle] = {
        name: FakeEngine(name, script(name), times=ServiceTime(), time_scale=time_scale)
        for name in ("planner", "solver", "critic")
    }
    for handle in handles.values():
        await handle.start()
    return handles


def slip_in_the_units(share: float) -> Slip:
    """Return a slip that makes the units digit wrong in this share of the replies, chosen by the request's seed."""

    def slip(text: str, rng: random.Random) -> str:
        if rng.random() >= share:
            return text
        *before, units, tens, hundreds, thousands, top, sign = text.split()
        return " ".join([*before, str((int(units) + 1) % 10), tens, hundreds, thousands, top, sign])

    return slip
