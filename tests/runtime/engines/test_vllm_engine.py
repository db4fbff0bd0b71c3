"""The translation of requests into vLLM's sampling parameters. Values that would kill a worker on a GPU never reach it.

These tests use vLLM's own classes and start no engine.
"""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
from vllm import SamplingParams, envs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.core.sched.utils import check_sequence_repetition
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.worker.gpu.sample import logit_bias

from runtime.engines import vllm_engine
from runtime.engines.request import GenerateRequest
from runtime.engines.sampling import (
    BAD_WORDS,
    BAD_WORDS_BYTES,
    LISTED_TOKENS,
    STOP_TOKENS,
    check_limits,
    to_params,
    with_params,
)
from runtime.engines.spec import EngineSpec
from runtime.engines.step_time import StepTime
from runtime.engines.vllm_config import vllm_config
from runtime.engines.vllm_engine import VllmEngine
from runtime.errors import EngineError, RequestRefused
from scripts.tiny_model import write_chat_model

MAX_MODEL_LEN = 512


def sampling(**changes: Any) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 40, **changes}
    return to_params(GenerateRequest("r", (), **values), MAX_MODEL_LEN)


def check(stops: range, min_tokens: int, model_stops: list[int]) -> None:
    """Check a request to a model that has these stop tokens of its own."""
    further = {"stop_token_ids": [*stops], "min_tokens": min_tokens}
    check_limits(sampling(sampling_params=further), {"eos_token_id": model_stops}, model_stops[0])


def test_the_stop_token_limit_is_the_workers() -> None:
    assert STOP_TOKENS == logit_bias.MAX_NUM_STOP_TOKEN_IDS


@pytest.mark.parametrize(("model_stops", "most"), [([2], 127), ([2, 3, 4], 125)])
def test_stop_tokens_beside_min_tokens_are_limited_together_with_the_models_own(
    model_stops: list[int], most: int
) -> None:
    check(range(5, 5 + most), 1, model_stops)
    check(range(5, 5 + most + 1), 0, model_stops)  # without min_tokens there is no limit
    with pytest.raises(RequestRefused, match=rf"^stop_token_ids: at most {most} .* beside min_tokens; got {most + 1}"):
        check(range(5, 5 + most + 1), 1, model_stops)


def test_a_stop_token_of_the_model_in_the_request_counts_once() -> None:
    check(range(128), 1, [2, 3, 4])
    with pytest.raises(RequestRefused, match="at most 128"):
        check(range(129), 1, [2, 3, 4])


@pytest.mark.parametrize(
    ("most", "beyond"),
    [
        ({"allowed_token_ids": [1] * 1024}, {"allowed_token_ids": [1] * 1025}),
        ({"logit_bias": dict.fromkeys(range(1024), 1.0)}, {"logit_bias": dict.fromkeys(range(1025), 1.0)}),
        ({"bad_words": [str(n + 10) for n in range(64)]}, {"bad_words": [str(n + 10) for n in range(65)]}),
        ({"bad_words": ["x" * 400]}, {"bad_words": ["x" * 401]}),
    ],
)
def test_lists_that_kill_a_worker_are_refused(most: dict[str, Any], beyond: dict[str, Any]) -> None:
    check_limits(sampling(sampling_params=most), {}, None)
    with pytest.raises(RequestRefused, match=f"^{next(iter(beyond))}: at most"):
        check_limits(sampling(sampling_params=beyond), {}, None)


def test_the_limits_are_the_workers() -> None:
    assert LISTED_TOKENS == logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS == logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS
    assert envs.VLLM_MAX_NUM_BAD_WORDS >= 2 * BAD_WORDS
    assert envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS >= 2 * BAD_WORDS_BYTES + BAD_WORDS


@pytest.mark.parametrize("tokens", [2**31 - 1, 2**31, 10**30])
def test_token_counts_fit_the_workers_32_bit_integers(tokens: int) -> None:
    """A worker on a GPU adds each count to the prompt's length in an int32 (vllm/v1/worker/gpu/states.py)."""
    lengths = np.zeros(1, dtype=np.int32)
    with pytest.raises(OverflowError):
        lengths[0] = MAX_MODEL_LEN + tokens
    params = sampling(max_tokens=tokens, sampling_params={"min_tokens": tokens})
    assert (params.max_tokens, params.min_tokens) == (MAX_MODEL_LEN, MAX_MODEL_LEN)


def test_tokens_from_before_a_crash_count_towards_max_and_min_tokens() -> None:
    params = sampling(max_tokens=40, sampling_params={"min_tokens": 40}, resume_tokens=(5, 6, 7))
    assert (params.max_tokens, params.min_tokens) == (37, 37)
    assert sampling(max_tokens=None, sampling_params={"min_tokens": 2}, resume_tokens=(5, 6, 7)).min_tokens == 0


def test_a_request_with_vllms_parameters_has_them_again_when_an_engine_serves_it() -> None:
    theirs = SamplingParams(
        temperature=0.5,
        top_k=7,
        stop=["x"],
        seed=3,
        logprobs=2,
        max_tokens=9,
        min_tokens=2,
        n=3,
        presence_penalty=0.25,
        skip_special_tokens=False,
        logit_bias={5: 1.0},
        structured_outputs=StructuredOutputsParams(regex="[0-9]+"),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    request = with_params(GenerateRequest("r", (), temperature=1, top_p=1, max_tokens=None), theirs)
    assert not request.resumable
    ours = to_params(request, MAX_MODEL_LEN)
    differing = {name for name in theirs.__struct_fields__ if getattr(ours, name) != getattr(theirs, name)}
    assert differing == {"n", "output_kind", "stream_interval"}
    assert not with_params(request, SamplingParams()).sampling_params


def test_engines_register_no_metrics_in_the_registry_of_the_process() -> None:
    loggers = StatLoggerManager(None, custom_stat_loggers=[vllm_engine.NoPrometheus], enable_default_loggers=False)
    assert [type(logger) for logger in loggers.stat_loggers] == [vllm_engine.NoPrometheus]
    loggers.log_engine_initialized()
    loggers.record(None, None)
    loggers.record_admission_rejection("full")
    assert not any(name.startswith("vllm:") for name in prometheus_client.REGISTRY._names_to_collectors)


def test_engines_of_two_runs_share_what_vllm_compiles(tmp_path: Path) -> None:
    spec = EngineSpec(model=str(write_chat_model(tmp_path / "model")), max_model_len=MAX_MODEL_LEN)

    def made(run: str, spec: EngineSpec = spec) -> Any:
        folder = tmp_path / run
        return VllmEngine(f"engine-{run}", spec, folder / "log", folder, 1 << 30, step_time=StepTime(8))._config()

    first = made("a")
    assert made("b").compute_hash() == first.compute_hash()  # vLLM's key for the compiled model
    assert made("b", spec.model_copy(update={"max_model_len": 256})).compute_hash() != first.compute_hash()
    sent = pickle.loads(pickle.dumps(first))  # as to the engine's process
    assert (sent.compute_hash(), sent.troupe_settings) == (first.compute_hash(), first.troupe_settings)
    assert (sent.troupe_settings.log, sent.troupe_settings.step_time) == (tmp_path / "a" / "log", StepTime(8))


def test_an_engine_with_a_kv_connector_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_connector(*arguments: Any) -> VllmConfig:
        config = vllm_config(*arguments)
        config.kv_transfer_config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
        return config

    monkeypatch.setattr(vllm_engine, "vllm_config", with_connector)
    engine = VllmEngine("solver", EngineSpec(model=str(write_chat_model(tmp_path))), tmp_path / "log", tmp_path)
    with pytest.raises(EngineError, match=r"vLLM would copy KV blocks .*kv_transfer_config"):
        engine._config()


async def test_a_gpu_refuses_to_emulate_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    spec = EngineSpec(model="/no/model")
    engine = vllm_engine.VllmEngine("solver", spec, tmp_path / "log", tmp_path, step_time=StepTime(8))
    with pytest.raises(EngineError, match=r"engine solver did not start: .* leave out --emulate"):
        await engine.start()


STUCK = [7, 8, 9] * 64
NUMBERS = {"a third": [3] * 20, "a list of zeros": [0, 1] * 40, "a power of ten": [5] * 60}


def test_reply_that_repeats_itself_is_stopped() -> None:
    params = sampling(schema={})
    assert params.repetition_detection is not None
    assert check_sequence_repetition([1, 2, *STUCK], params.repetition_detection)
    assert not check_sequence_repetition([1, 2, *STUCK[:-1]], params.repetition_detection)
    assert sampling().repetition_detection is None


@pytest.mark.parametrize("tokens", NUMBERS.values(), ids=NUMBERS)
def test_numbers_with_equal_digits_are_not_stopped(tokens: list[int]) -> None:
    params = sampling(schema={})
    assert params.repetition_detection is not None
    assert not any(
        check_sequence_repetition(tokens[:length], params.repetition_detection) for length in range(len(tokens) + 1)
    )
