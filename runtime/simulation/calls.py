"""Counts the calls that a workload makes to each engine, over modelled engines that reply at once."""

import json
from collections.abc import Mapping

from agents import json_example
from agents.arithmetic import oracle
from runtime.bench.workload import Source
from runtime.engines.request import GenerateRequest
from runtime.errors import ConfigError
from runtime.jobs.job import Job
from runtime.jobs.team import Team
from runtime.simulation import load
from runtime.simulation.assembly import KV_CACHE_BYTES, MODEL
from runtime.simulation.fit import record

COUNTED_JOBS = 200
"""Jobs of each phase whose calls are counted."""


async def calls_per_s(source: Source, teams: Mapping[str, Team]) -> dict[str, dict[str, float]]:
    """Return the calls per second of each phase to each engine, at the workload's own rates.

    `teams` has the team of each phase. Raises ConfigError if a phase has no rate.
    """
    constants = load.read(MODEL)
    names = {seat.engine for team in teams.values() for seat in team.seats.values()}
    # Only the calls are counted, so engines that the constants lack can have those of any other.
    known = constants.engines
    constants = constants.model_copy(update={"engines": {name: known.get(name, known["critic"]) for name in names}})
    scripts = dict.fromkeys(names, reply)
    arrivals = source.draw(1, 0).arrivals
    calls: dict[str, dict[str, float]] = {}
    async with load.engines(constants, scripts, KV_CACHE_BYTES, time_scale=0) as (engines, _):
        for phase in source.workload.phases:
            if phase.jobs_per_s is None:
                raise ConfigError(
                    f"workload {source.name}: phases.{phase.name}.jobs_per_s: this key is required; "
                    "a closed loop has no rate to scale"
                )
            problems = [arrival.problem for arrival in arrivals if arrival.phase == phase.name][:COUNTED_JOBS]
            jobs = [
                Job(str(number), problem.problem, problem.expected, compare=problem.compare)
                for number, problem in enumerate(problems)
            ]
            requests = await record(teams[phase.name], engines, jobs) if jobs else {}
            calls[phase.name] = {name: phase.jobs_per_s * len(sent) / len(jobs) for name, sent in requests.items()}
    return calls


def reply(request: GenerateRequest) -> str:
    """Return a reply to a role's chat: the correct one of the embedded team's models, or one that fits the schema.

    Samples of one task differ, so that debaters do not always agree. The lengths of modelled replies do not depend on
    their text.
    """
    character = str(1 + (request.seed or 0) % 2)
    if request.schema is not None:
        return json.dumps(json_example.example(request.schema, character))
    try:
        return oracle.reply(request.messages[-1].content)
    except (ValueError, LookupError, SyntaxError, AssertionError):
        return character
