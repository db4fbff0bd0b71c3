"""The translation between requests and vLLM's sampling parameters, in both directions."""

from dataclasses import replace
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from runtime.engines.request import GenerateRequest
from runtime.errors import RequestRefused

STOP_TOKENS = 128
"""The most stop tokens, those of the model included, that a request with `min_tokens` may have. One more kills the
worker on a GPU: MAX_NUM_STOP_TOKEN_IDS in vllm/v1/worker/gpu/sample/logit_bias.py."""
_FIELDS_OF_A_REQUEST = {"temperature", "top_p", "max_tokens", "stop", "seed", "logprobs", "stream_interval"}
_SET_BY_THE_ENGINE = {"n", "output_kind", "skip_clone", "output_text_buffer_length"}


def with_params(request: GenerateRequest, params: SamplingParams) -> GenerateRequest:
    """Return a request with these sampling parameters. How many replies they ask for, and in what pieces, is left out.

    `params` must not have been used by vLLM yet.
    """
    default = SamplingParams()
    others = {
        name: value
        for name in set(params.__struct_fields__) - _FIELDS_OF_A_REQUEST - _SET_BY_THE_ENGINE
        if not name.startswith("_") and (value := getattr(params, name)) != getattr(default, name)
    }
    return replace(
        request,
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens,
        stop=tuple(params.stop),
        seed=params.seed,
        logprobs=params.logprobs,
        sampling_params=others,
    )


def to_params(request: GenerateRequest, max_model_len: int) -> SamplingParams:
    """Return vLLM's sampling parameters for a request.

    Token counts are cut to the model's length, beyond which nothing is generated, because a worker on a GPU adds them
    to the length of the prompt in 32 bits.
    """
    further: dict[str, Any] = dict(request.sampling_params)

    def still_to_generate(tokens: int) -> int:
        return min(tokens, max_model_len) - len(request.resume_tokens)

    if "min_tokens" in further:
        further["min_tokens"] = max(0, still_to_generate(further["min_tokens"]))
    if request.schema:
        further["structured_outputs"] = StructuredOutputsParams(json=dict(request.schema))
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=None if request.max_tokens is None else still_to_generate(request.max_tokens),
        logprobs=request.logprobs,
        stop=list(request.stop) or None,
        seed=request.seed,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=request.stream_interval,
        **further,
    )


def check_stops(params: SamplingParams, generation_config: dict[str, Any], eos_token: int | None) -> None:
    """Raise RequestRefused for more stop tokens beside `min_tokens` than a worker on a GPU survives.

    The model's own stop tokens, which vLLM adds to those of the request, count too. They come from the model's
    `generation_config` and its tokenizer's `eos_token`.
    """
    if not params.min_tokens:
        return
    stop_ids = set(params.stop_token_ids)
    own = SamplingParams()
    own.update_from_generation_config(generation_config, eos_token)
    most = STOP_TOKENS - len(own.all_stop_token_ids - stop_ids)
    if len(stop_ids) > most:
        raise RequestRefused(
            f"stop_token_ids: at most {most} different ids are possible beside min_tokens; got {len(stop_ids)}"
        )
