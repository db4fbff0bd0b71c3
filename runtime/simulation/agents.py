"""The paper's four agents as a request-level simulation: independent callers, each with its own engine.

An agent that serves T requests a second on a whole GPU has an engine with 100 places, one for each hundredth of the
memory. A request occupies a place for 100 / T seconds. With a share g, the engine therefore serves g T requests a
second, as in the paper. Unlike in the paper, requests arrive one by one (as a Poisson process), and latency is measured
on answered requests. At a load of 1, the agents together need one whole GPU. Their arrival rates keep the paper's
proportions.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from agents.role import Message, Reply, Role, Sampling, Task, Value
from agents.tasks import Answer, AnswerTask
from agents.workflow import Entry, Outcome, RoleCall, Unusable, Workflow
from runtime.bench.workload import Arrival, Schedule, Source, Workload
from runtime.jobs.problems import Problem
from runtime.jobs.team import Seat, Team
from runtime.simulation.load import EngineModel, Model
from runtime.simulation.paper import AGENTS

PLACES = 100
TOKENS = 10
"""Length of a reply. It only divides the time of a request into steps."""
PLACE_BYTES = 1 << 20
SECONDS = 60.0
"""Seconds for which requests arrive."""


class Caller(Role):
    """A role that asks for an answer and accepts any text."""

    name = "caller"
    takes = (AnswerTask,)

    def messages(self, task: Task) -> list[Message]:
        return [Message("user", str(task))]

    def parse(self, text: str, task: Task) -> Reply:
        return Answer(answer=text)


class OneCall(Workflow):
    """A workflow of one call to one seat."""

    class Options(Value):
        """The seat that is called."""

        seat: str

    options: Options

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[Task], ...]]:
        assert isinstance(options, OneCall.Options)
        return {options.seat: (AnswerTask,)}

    def begin(self) -> list[RoleCall]:
        return [self.ask(self.options.seat, AnswerTask(self.problem))]

    def take(self, call: RoleCall, reply: Reply | Unusable) -> list[RoleCall]:
        self.transcript.append(Entry(call.seat, str(call.task), str(reply)))
        self.outcome = Outcome(str(reply), None, 0)
        return []

    def ahead(self) -> Mapping[str, int]:
        return {}


@dataclass(frozen=True)
class AgentsSource(Source):
    """The superposed Poisson arrivals of all agents."""

    name: str = "the paper's agents"
    workload: Workload = field(default_factory=lambda: Workload(trace="none", loads=(0.3, 0.6, 0.9, 1.2, 1.5)))
    problems: tuple[Problem, ...] = ()

    def draw(self, load: float, seed: int) -> Schedule:
        gpus = sum(agent.arrivals / agent.throughput for agent in AGENTS)
        arrivals = []
        for agent in AGENTS:
            rng = random.Random(f"{seed}/{agent.name}")
            at_s = 0.0
            while (at_s := at_s + rng.expovariate(agent.arrivals * load / gpus)) < SECONDS:
                arrivals.append(Arrival(at_s, agent.name, Problem("", "x")))
        return Schedule(tuple(sorted(arrivals, key=lambda arrival: arrival.at_s)), ())


def model() -> Model:
    """Return one engine for each agent. Busy places do not slow each other down."""
    return Model(
        lanes=len(AGENTS),
        engines={
            agent.name: EngineModel(
                step_s=PLACES / agent.throughput / TOKENS,
                token_s=0,
                block_bytes=PLACE_BYTES,
                block_tokens=PLACE_BYTES,
                null_blocks=0,
                max_num_seqs=PLACES,
            )
            for agent in AGENTS
        },
    )


def team() -> Team:
    """Return the team of all four agents, with the paper's minimum shares and priorities."""
    seats = {
        agent.name: Seat(
            agent.name, Caller(), agent.name, Sampling(), priority=agent.priority, minimum_share=agent.minimum
        )
        for agent in AGENTS
    }
    return Team(seats, OneCall, OneCall.Options(seat=AGENTS[0].name))


def teams() -> dict[str, Team]:
    """Return a team of one seat for each agent, by the agent's name."""
    seats = team().seats
    return {name: Team({name: seat}, OneCall, OneCall.Options(seat=name)) for name, seat in seats.items()}
