"""Drawn lengths of prompts and replies. Modelled engines count these tokens, without any text for them.

A length is lognormal: 95% of the distribution lies between its bounds, and the rest is cut off at them.
"""

import math
import random
from statistics import NormalDist

from runtime.bench.workload import Bounds, Lengths
from runtime.engines import fake
from runtime.engines.request import GenerateRequest

_DEVIATIONS = NormalDist().inv_cdf(0.975)
"""Standard deviations from the middle of a normal distribution to the end of its central 95%."""


def drawn(lengths: Lengths) -> fake.Lengths:
    """Return the function that draws the lengths of a request.

    Equal prompts have equal lengths. The length of a reply depends on the request's id without its first and last part.
    In a benchmark these are the policy and a serial number, so every policy gets the same lengths.
    """

    def draw(request: GenerateRequest) -> tuple[int, int]:
        prompt = request.messages[-1].content
        call = request.request_id.partition("/")[2].rpartition("/")[0]
        return _draw(lengths.prompt, prompt), _draw(lengths.reply, call)

    return draw


def mean(bounds: Bounds) -> float:
    """Return the mean of the lognormal distribution between two bounds, as if it were not cut off."""
    mu, sigma = _parameters(bounds)
    return math.exp(mu + sigma**2 / 2)


def _draw(bounds: Bounds, seed: str) -> int:
    low, high = bounds
    return min(max(round(random.Random(seed).lognormvariate(*_parameters(bounds))), low), high)


def _parameters(bounds: Bounds) -> tuple[float, float]:
    """Return the mean and the standard deviation of the logarithm of a length."""
    low, high = map(math.log, bounds)
    return (low + high) / 2, (high - low) / 2 / _DEVIATIONS
