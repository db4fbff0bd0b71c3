"""A team of fake engines that reply as flawless embedded models would, with slips on request."""

import random
from collections.abc import Callable

from agents.arithmetic import oracle
from runtime import config
from runtime.engines.fake import FakeEngine, ServiceTime
from runtime.engines.handle import EngineHandle
from runtime.engines.request import GenerateRequest
from runtime.jobs.team import Team, assemble

Slip = Callable[[str, random.Random], str]


def embedded_team(workflow: str = "deliberate") -> Team:
    """The shipped team with another workflow."""
    return assemble(config.load("embedded").with_workflow(workflow))


async def engines(slip: Slip = lambda text, rng: text, time_scale: float = 0) -> dict[str, EngineHandle]:
    """Fake planner, solver and critic, started; `slip` may change what the solver says."""

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
    """Get the units digit of a result wrong in that share of the replies, by the request's seed."""

    def slip(text: str, rng: random.Random) -> str:
        if rng.random() >= share:
            return text
        *before, units, tens, hundreds, thousands, top, sign = text.split()
        return " ".join([*before, str((int(units) + 1) % 10), tens, hundreds, thousands, top, sign])

    return slip
