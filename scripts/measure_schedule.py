"""Measure how far policies are from the best possible schedule. The figures are in runtime/simulation/README.md.

    python scripts/measure_schedule.py search          small bursts under each policy, and their best schedules
    python scripts/measure_schedule.py bound FOLDER    tokens/s in the results of `troupe simulate load`, and a bound

Both are for engines that take turns on one device (`lanes: 1`).

**search.** All jobs of a burst arrive at once. Each calls engines one after the other, and each call takes one block of
memory. The search finds the schedule that ends all jobs first, and the one with the shortest mean job time, among those
that preempt nothing. It knows the lengths of all replies, and moves memory at no cost. Whenever a call ends, it chooses
which engine runs next, and which waiting calls this engine admits. Policies run over modelled engines, under the real
controller.

**bound.** A step of an engine takes at least `step_s`, and computes at most the sequences whose blocks fit into the
memory that the other engines can spare. So the calls of the jobs that arrive at a time t or later take at least a
certain time, and none of them begins before t. The bound is not always within reach. The modelled processor undercuts
it by a step now and then: a step that began alone keeps its speed when another one begins.
"""

import argparse
import heapq
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents.role import Sampling, Value
from agents.tasks import AnswerTask
from agents.workflow import Entry, Outcome, RoleCall, Unusable, Workflow
from runtime import config as configuration
from runtime.bench import results
from runtime.bench.output import Output
from runtime.bench.plan import Plan, rivals
from runtime.bench.results import JobRow, Spread
from runtime.bench.workload import Arrival, Schedule, Source, Workload
from runtime.cli.simulate import Simulated, run_simulated
from runtime.engines.request import GenerateRequest
from runtime.jobs.problems import Problem
from runtime.jobs.team import Seat, Team
from runtime.simulation import load, virtual_time
from runtime.simulation.agents import Caller
from runtime.simulation.load import EngineModel, Model

BLOCK_BYTES = 1 << 20
BLOCK_TOKENS = 512
"""Every call of a burst fits in one block."""
CONSTANTS = "gpu-like"
POLICIES = "turns,waterfill,modelclaim"


class Call(NamedTuple):
    """A call to an engine, whose reply has a number of tokens."""

    engine: str
    tokens: int


@dataclass(frozen=True)
class Burst:
    """Jobs that arrive at once. A kind of job is its calls, in order. `blocks` is the memory of all engines."""

    jobs: Mapping[tuple[Call, ...], int]
    blocks: int


CHAIN = (Call("planner", 60), Call("solver", 120), Call("critic", 40))
LONG = (Call("planner", 60), Call("solver", 300), Call("critic", 40))
DIRECT = (Call("solver", 120), Call("critic", 80))
BURSTS = {
    "12 chains, 8 blocks": Burst({CHAIN: 12}, 8),
    "24 chains, 12 blocks": Burst({CHAIN: 24}, 12),
    "48 chains, 24 blocks": Burst({CHAIN: 48}, 24),
    "8 chains and 8 long ones, 8 blocks": Burst({CHAIN: 8, LONG: 8}, 8),
    "8 chains and 8 without a planner, 8 blocks": Burst({CHAIN: 8, DIRECT: 8}, 8),
}


# -- the search ------------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """A running call: the kind of its job, its number in the job, and the tokens that it still has to generate."""

    kind: int
    number: int
    rest: int


class State(NamedTuple):
    """The progress of a burst. `waiting` counts the jobs of each kind by the call that they wait for."""

    waiting: tuple[tuple[int, ...], ...]
    running: tuple[Running, ...]


class Search:
    """The shortest path from the arrival of a burst to its end (A*): a schedule, whose edges end when calls end.

    The cost of an edge is its time. With `mean`, it is its time multiplied by the number of jobs that have not ended,
    which adds up to the sum of all job times.
    """

    def __init__(self, burst: Burst, engines: Mapping[str, EngineModel], mean: bool) -> None:
        self._kinds = list(burst.jobs)
        self._counts = list(burst.jobs.values())
        self._engines = engines
        self._blocks = burst.blocks
        self._most = burst.blocks - len(engines) + 1  # sequences of one engine; each other one keeps a block
        self._mean = mean

    def best(self) -> float:
        """Return the least cost: seconds until all jobs have ended, or with `mean` the sum of all job times."""
        waiting = tuple(
            (count, *(0,) * (len(calls) - 1)) for calls, count in zip(self._kinds, self._counts, strict=True)
        )
        start = State(waiting, ())
        costs = {start: 0.0}
        serial = itertools.count()
        queue = [(self._least(start), next(serial), start)]
        done: set[State] = set()
        while queue:
            _, _, state = heapq.heappop(queue)
            if state in done:
                continue
            if not self._unfinished(state):
                return costs[state]
            done.add(state)
            for following, seconds in self._moves(state):
                cost = costs[state] + seconds * (self._unfinished(state) if self._mean else 1)
                if cost < costs.get(following, float("inf")):
                    costs[following] = cost
                    heapq.heappush(queue, (cost + self._least(following), next(serial), following))
        raise AssertionError("no schedule ends the burst")

    def _moves(self, state: State) -> Iterator[tuple[State, float]]:
        """Yield what an engine can do next: admit some of its waiting calls, and step until one of its calls ends."""
        held = Counter(self._call(running.kind, running.number).engine for running in state.running)
        for engine in self._engines:
            spare = self._blocks - sum(max(1, held[other]) for other in self._engines if other != engine) - held[engine]
            places = [
                (kind, number)
                for kind, calls in enumerate(self._kinds)
                for number, call in enumerate(calls)
                if call.engine == engine and state.waiting[kind][number]
            ]
            choices = [range(min(state.waiting[kind][number], spare) + 1) for kind, number in places]
            for admitted in itertools.product(*choices):
                if held[engine] + sum(admitted) > 0 and sum(admitted) <= spare:
                    yield self._stepped(state, engine, dict(zip(places, admitted, strict=True)))

    def _stepped(self, state: State, engine: str, admitted: Mapping[tuple[int, int], int]) -> tuple[State, float]:
        others = [running for running in state.running if self._call(running.kind, running.number).engine != engine]
        batch = [running for running in state.running if self._call(running.kind, running.number).engine == engine]
        waiting = [list(counts) for counts in state.waiting]
        for (kind, number), count in admitted.items():
            waiting[kind][number] -= count
            batch += [Running(kind, number, self._call(kind, number).tokens)] * count
        steps = min(running.rest for running in batch)
        for running in batch:
            if running.rest > steps:
                others.append(running._replace(rest=running.rest - steps))
            elif running.number + 1 < len(self._kinds[running.kind]):
                waiting[running.kind][running.number + 1] += 1
        following = State(tuple(map(tuple, waiting)), tuple(sorted(others)))
        return following, steps * self._engines[engine].decode_step_s(len(batch))

    def _call(self, kind: int, number: int) -> Call:
        return self._kinds[kind][number]

    def _unfinished(self, state: State) -> int:
        return sum(map(sum, state.waiting)) + len(state.running)

    def _least(self, state: State) -> float:
        """Return a cost that no schedule from here can undercut: all tokens in the largest batches."""
        rests = [self._rest_s(running.kind, running.number, running.rest) for running in state.running]
        for kind, counts in enumerate(state.waiting):
            for number, count in enumerate(counts):
                rests += [self._rest_s(kind, number, self._call(kind, number).tokens)] * count
        return sum(itertools.accumulate(sorted(rests))) if self._mean else sum(rests)

    def _rest_s(self, kind: int, number: int, rest: int) -> float:
        """Return the device's least time for the rest of a job."""
        calls = self._kinds[kind]
        tokens = [(calls[number].engine, rest), *calls[number + 1 :]]
        return sum(count * self._engines[name].decode_step_s(self._most) / self._most for name, count in tokens)


# -- the policies ----------------------------------------------------------------------------------------------------


class Chain(Workflow):
    """A workflow of one call after the other. A task's text is the length of its reply."""

    class Options(Value):
        """The calls, in order."""

        calls: tuple[Call, ...]

    options: Options

    @classmethod
    def seats(cls, options: Value) -> Mapping[str, tuple[type[AnswerTask], ...]]:
        assert isinstance(options, Chain.Options)
        return {call.engine: (AnswerTask,) for call in options.calls}

    def begin(self) -> list[RoleCall]:
        return [self._next()]

    def take(self, call: RoleCall, reply: object) -> list[RoleCall]:
        assert not isinstance(reply, Unusable), reply
        self.transcript.append(Entry(call.seat, str(call.task), str(reply)))
        if len(self.transcript) < len(self.options.calls):
            return [self._next()]
        self.outcome = Outcome("done", None, 0)
        return []

    def ahead(self) -> Mapping[str, int]:
        return Counter(call.engine for call in self.options.calls[len(self.transcript) + 1 :])

    def _next(self) -> RoleCall:
        call = self.options.calls[len(self.transcript)]
        return self.ask(call.engine, AnswerTask(f"{call.tokens} tokens"))


class BurstSource(Source):
    """A source that draws a burst. The phase of an arrival is the number of the job's kind."""

    name = "burst"
    workload = Workload(trace="none", loads=(1,))
    problems = ()

    def __init__(self, burst: Burst) -> None:
        self._burst = burst

    def draw(self, load: float, seed: int) -> Schedule:
        kinds = itertools.chain.from_iterable([kind] * count for kind, count in enumerate(self._burst.jobs.values()))
        return Schedule(tuple(Arrival(0.0, str(kind), Problem("", "x")) for kind in kinds), ())


def reply(request: GenerateRequest) -> str:
    """Return a reply of the length that the request asks for."""
    found = re.search(r"(\d+) tokens", request.messages[-1].content)
    assert found, request.messages
    return " ".join(["word"] * int(found[1]))


def play(burst: Burst, engines: Mapping[str, EngineModel], policies: str, plays: int) -> dict[str, list[list[JobRow]]]:
    """Play a burst under each policy, and return the jobs of each play. A play before these shows the costs."""
    seats = {name: Seat(name, Caller(), name, Sampling()) for name in engines}
    teams = {}
    for kind, calls in enumerate(burst.jobs):
        members = {name: seats[name] for name in dict.fromkeys(call.engine for call in calls)}
        teams[str(kind)] = Team(members, Chain, Chain.Options(calls=calls))
    first = next(iter(burst.jobs))
    whole_team = Team(seats, Chain, Chain.Options(calls=first))
    simulated = Simulated(whole_team, teams, Model(lanes=1, engines=engines), reply, burst.blocks * BLOCK_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        plan = Plan(configuration.load("embedded"), BurstSource(burst), rivals(policies), (1.0,), plays + 1, False, out)
        with Output(plan.folder) as output:
            virtual_time.run(run_simulated(plan, simulated, output))
        jobs: dict[str, list[list[JobRow]]] = defaultdict(lambda: [[] for _ in range(plays + 1)])
        for row in results.read_jobs(out):
            jobs[row.policy][row.repeat].append(row)
    return {policy: played[1:] for policy, played in jobs.items()}


def measure_search(policies: str, plays: int) -> dict[str, Any]:
    """Return the best times of every burst in seconds, and those of the policies as multiples of them."""
    constants = load.read(CONSTANTS)
    changes = {
        "prefill_s": 0.0,
        "call_s": 0.0,
        "null_blocks": 0,
        "block_bytes": BLOCK_BYTES,
        "block_tokens": BLOCK_TOKENS,
    }
    engines = {name: engine.model_copy(update=changes) for name, engine in constants.engines.items()}
    record: dict[str, Any] = {}
    for name, burst in BURSTS.items():
        count = sum(burst.jobs.values())
        least_s, mean_s = Search(burst, engines, mean=False).best(), Search(burst, engines, mean=True).best() / count
        record[name] = {"best": {"all_s": least_s, "mean_s": mean_s}}
        for policy, played in play(burst, engines, policies, plays).items():
            all_jobs = [max(row.jct_s for row in rows) / least_s for rows in played]
            each_job = [statistics.fmean(row.jct_s for row in rows) / mean_s for rows in played]
            record[name][policy] = {"all": asdict(Spread.of(all_jobs)), "mean": asdict(Spread.of(each_job))}
        print(name, json.dumps(record[name]), file=sys.stderr)
    return record


# -- the bound -------------------------------------------------------------------------------------------------------


class Demand(NamedTuple):
    """Counts what calls need of an engine. `block_steps` adds up the blocks that they hold in each of their steps."""

    block_steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0

    def plus(self, other: "Demand") -> "Demand":
        return Demand(*map(sum, zip(self, other, strict=True)))


def demand(engine: EngineModel, prompt_tokens: int, tokens: int) -> Demand:
    """Return what a call needs. With each token that it generates, its blocks cover one more."""
    blocks = (-(-(prompt_tokens + generated + 1) // engine.block_tokens) for generated in range(tokens))
    return Demand(sum(blocks), tokens, prompt_tokens)


def least_s(demands: Mapping[str, Demand], constants: Model, budget_bytes: int) -> float:
    """Return the device's least time for demands, in seconds."""
    floors = {
        name: (each.floor_blocks + each.null_blocks) * each.block_bytes for name, each in constants.engines.items()
    }
    seconds = 0.0
    for name, needed in demands.items():
        engine = constants.engines[name]
        spare_bytes = budget_bytes - sum(floors.values()) + engine.floor_blocks * engine.block_bytes
        steps = max(needed.block_steps / (spare_bytes // engine.block_bytes), needed.tokens / engine.max_num_seqs)
        seconds += steps * engine.step_s + needed.tokens * engine.token_s + needed.prompt_tokens * engine.prefill_s
    return seconds


def least_end_s(jobs: list[JobRow], constants: Model, budget_bytes: int) -> float:
    """Return the earliest time at which all jobs can have ended, in seconds from the start of the run."""
    demands: dict[str, Demand] = defaultdict(Demand)
    end_s = 0.0
    for row in sorted(jobs, key=lambda row: -row.arrived_s):
        for call in row.calls:
            needed = demand(constants.engines[call.seat], call.prompt_tokens, call.completion_tokens)
            demands[call.seat] = demands[call.seat].plus(needed)
        end_s = max(end_s, row.arrived_s + least_s(demands, constants, budget_bytes))
    return end_s


def measure_bound(folder: Path, name: str, config: str) -> dict[str, Any]:
    """Return the bound of the time of all jobs, divided by their time, for each load and policy.

    This is also the ratio of the policy's tokens/s to the highest that are possible.
    """
    constants = load.read(name)
    assert constants.lanes == 1, f"the engines of {name} do not take turns"
    assert constants.device_bytes is None, f"the engines of {name} sleep"
    assert results.read_summary(folder).kind == "simulation", f"{folder} is not a simulation"
    budget_bytes = constants.kv_cache_bytes or configuration.load(config).device.kv_cache_memory_bytes
    assert budget_bytes is not None, f"neither {name} nor {config} says how much KV cache there is"
    runs: dict[tuple[float, str, int], list[JobRow]] = defaultdict(list)
    for row in results.read_jobs(folder):
        runs[row.load, row.policy, row.repeat].append(row)
    parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (of_load, policy, _), rows in sorted(runs.items()):
        end_s = max(row.arrived_s + row.jct_s for row in rows)
        parts[f"load {of_load:g}"][policy].append(least_end_s(rows, constants, budget_bytes) / end_s)
    return {
        of_load: {policy: asdict(Spread.of(each)) for policy, each in policies.items()}
        for of_load, policies in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    search = commands.add_parser("search", help="print times of policies, as multiples of the best schedule's")
    search.add_argument("--policies", default=POLICIES)
    search.add_argument("--plays", type=int, default=11, help="plays of each burst under each policy")
    bound = commands.add_parser("bound", help="print tokens/s of policies on one device, as parts of a bound")
    bound.add_argument("folder", type=Path)
    bound.add_argument("--constants", default=CONSTANTS)
    bound.add_argument("--config", default="embedded-scarce")
    options = parser.parse_args()
    if options.what == "search":
        record = measure_search(options.policies, options.plays)
    else:
        record = measure_bound(options.folder, options.constants, options.config)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
