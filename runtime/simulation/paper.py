"""The simulation of arXiv 2512.22149, reconstructed from its published parameters.

Time advances in steps of 1 s. In each step, an agent with arrival rate lambda, share g and throughput T on a whole GPU
receives lambda requests and serves min(queue, g T). It then records queue / (g T) as its latency, or 1,000 s if it has
no share. Means are over agents and steps. The paper publishes neither code nor formulas; these formulas give its
figures.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.control.policies.paper import algorithm_1

NO_SHARE_S = 1000.0
PRICE_PER_GPU_HOUR = 0.72
"""Our assumption. With it, a run costs the published $0.020."""


@dataclass(frozen=True)
class Agent:
    """An agent of the paper's Table I.

    `throughput` is in requests/s on a whole GPU, `minimum` is the minimum share R, `priority` is P (1 is high), and
    `arrivals` is in requests/s.
    """

    name: str
    model_mb: int
    throughput: float
    minimum: float
    priority: int
    arrivals: float


AGENTS = (
    Agent("coordinator", 500, 100, 0.10, 1, 80),
    Agent("NLP", 2000, 50, 0.30, 2, 40),
    Agent("vision", 1500, 60, 0.25, 2, 45),
    Agent("reasoning", 3000, 30, 0.35, 1, 25),
)
PUBLISHED = {
    "static": "110.3 s, 60.0/s",
    "round_robin": "756.8 s",
    "paper": "111.9 s, 58.1/s; 85% below round-robin",
}
Shares = Callable[[int], Sequence[float]]
"""Returns the share of every agent in a step."""


@dataclass(frozen=True)
class Row:
    """The result of one policy.

    `charged_s` is the part of the mean latency `latency_s` that comes from the 1,000 s for having no share.
    `left_in_queues` counts the requests that wait at the end. `cost` is in dollars.
    """

    policy: str
    latency_s: float
    charged_s: float
    requests_per_s: float
    left_in_queues: float
    cost: float
    published: str


def table(agents: Sequence[Agent] = AGENTS, steps: int = 100) -> list[Row]:
    """Simulate the three policies that the paper compares."""
    equal = [1 / len(agents)] * len(agents)
    adaptive = algorithm_1([a.arrivals for a in agents], [a.minimum for a in agents], [a.priority for a in agents])
    policies: dict[str, Shares] = {
        "static": lambda step: equal,
        "round_robin": lambda step: [float(number == step % len(agents)) for number in range(len(agents))],
        "paper": lambda step: adaptive,
    }
    return [_simulate(name, shares, agents, steps) for name, shares in policies.items()]


def _simulate(policy: str, shares: Shares, agents: Sequence[Agent], steps: int) -> Row:
    queues = [0.0] * len(agents)
    latencies: list[float] = []
    charged = 0.0
    served = 0.0
    for step in range(steps):
        for number, (agent, share) in enumerate(zip(agents, shares(step), strict=True)):
            queues[number] += agent.arrivals
            done = min(queues[number], share * agent.throughput)
            queues[number] -= done
            served += done
            latencies.append(queues[number] / (share * agent.throughput) if share else NO_SHARE_S)
            charged += 0.0 if share else NO_SHARE_S
    return Row(
        policy,
        statistics.fmean(latencies),
        charged / len(latencies),
        served / steps,
        sum(queues),
        steps / 3600 * PRICE_PER_GPU_HOUR,
        PUBLISHED[policy],
    )
