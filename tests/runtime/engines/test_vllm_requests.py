"""Requests in vLLM's words: what would end the worker on a GPU never reaches it. vLLM's own classes, no engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample import logit_bias

from runtime.engines import vllm_engine
from runtime.engines.request import GenerateRequest
from runtime.errors import RequestRefused

LENGTH = 512
"""Of the model, in tokens."""


def sampling(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 40, **changes}
    return vllm_engine._sampling(GenerateRequest("r", (), **values), LENGTH)


def check(stops: range, min_tokens: int, ends: list[int]) -> None:
    """Check a request to a model that has these ends."""
    llm = SimpleNamespace(
        input_processor=SimpleNamespace(generation_config_fields={"eos_token_id": ends}),
        renderer=SimpleNamespace(get_eos_token_id=lambda: ends[0]),
    )
    further = {"stop_token_ids": [*stops], "min_tokens": min_tokens}
    vllm_engine._check_stops(sampling(further=further), llm)


def test_the_bound_of_stop_tokens_is_the_workers() -> None:
    assert vllm_engine.STOP_TOKENS == logit_bias.MAX_NUM_STOP_TOKEN_IDS


@pytest.mark.parametrize(("ends", "most"), [([2], 127), ([2, 3, 4], 125)])
def test_stop_tokens_beside_min_tokens_are_bounded_with_the_models_own(ends: list[int], most: int) -> None:
    check(range(5, 5 + most), 1, ends)
    check(range(5, 5 + most + 1), 0, ends)  # alone they are only looked up
    with pytest.raises(RequestRefused, match=rf"^stop_token_ids: at most {most} .* beside min_tokens; got {most + 1}"):
        check(range(5, 5 + most + 1), 1, ends)


def test_an_end_of_the_model_that_is_given_too_counts_once() -> None:
    check(range(128), 1, [2, 3, 4])
    with pytest.raises(RequestRefused, match="at most 128"):
        check(range(129), 1, [2, 3, 4])


@pytest.mark.parametrize("tokens", [2**31 - 1, 2**31, 10**30])
def test_counts_of_tokens_fit_the_workers_integers(tokens: int) -> None:
    """A worker on a GPU adds each to the prompt's length in an int32 (vllm/v1/worker/gpu/states.py)."""
    lengths = np.zeros(1, dtype=np.int32)
    with pytest.raises(OverflowError):
        lengths[0] = LENGTH + tokens
    made = sampling(max_tokens=tokens, further={"min_tokens": tokens})
    assert (made.max_tokens, made.min_tokens) == (LENGTH, LENGTH)


def test_what_was_written_before_a_crash_counts_to_both() -> None:
    made = sampling(max_tokens=40, further={"min_tokens": 40}, given=(5, 6, 7))
    assert (made.max_tokens, made.min_tokens) == (37, 37)
    assert sampling(max_tokens=None, further={"min_tokens": 2}, given=(5, 6, 7)).min_tokens == 0
