"""The translation between requests and vLLM's sampling parameters, in both directions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

from runtime.engines.request import GenerateRequest
from runtime.errors import InputError, RequestRefused

STOP_TOKENS = 128
"""The most stop tokens, those of the model included, that a request with `min_tokens` may have."""
LISTED_TOKENS = 1024
"""The most tokens in `allowed_token_ids` and in `logit_bias`. One more, or one more stop token, kills the worker on a
GPU: vllm/v1/worker/gpu/sample/logit_bias.py."""
BAD_WORDS, BAD_WORDS_BYTES = 64, 400
"""The most bad words, and the most bytes in all of them. vLLM turns each word into tokens twice, with and without a
blank before it, and a token has at least a byte. So they have at most 864 tokens; more than 1024 kill the worker."""
REPETITION = RepetitionDetectionParams(max_pattern_size=8, min_count=64)
"""Ends a reply once a pattern of at most 8 tokens has occurred 64 times in a row: the model is stuck.

Fewer times would end replies that are right, such as 0.3333333333333333 or a list of 16 zeros.
"""
_NESTED: Mapping[str, Any] = {
    "structured_outputs": StructuredOutputsParams,
    "repetition_detection": RepetitionDetectionParams,
}
"""The parameters that are objects."""
INTEGER_MAX = 2**31 - 1
_FIELDS_OF_A_REQUEST = {"temperature", "top_p", "max_tokens", "stop", "seed", "logprobs", "stream_interval"}
_SET_BY_THE_ENGINE = {"n", "output_kind", "skip_clone", "output_text_buffer_length"}
_DEFAULTS = {
    name: getattr(SamplingParams(), name)
    for name in SamplingParams.__struct_fields__
    if name not in _FIELDS_OF_A_REQUEST | _SET_BY_THE_ENGINE and not name.startswith("_")
}
"""The parameters that a request passes on unchanged, with their defaults."""


def with_params(request: GenerateRequest, params: SamplingParams) -> GenerateRequest:
    """Return a request with these sampling parameters, apart from `n` and `output_kind`.

    `params` must not have been used by vLLM yet. Raises InputError for an integer that does not fit 32 bits, as workers
    store them.
    """
    others = {name: value for name, default in _DEFAULTS.items() if (value := getattr(params, name)) != default}
    for name, value in others.items():
        if isinstance(value, int) and abs(value) > INTEGER_MAX and name != "min_tokens":
            raise InputError(f"{name}: must be at most {INTEGER_MAX}; got {value}")
    return replace(
        request,
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens,
        stop=tuple(params.stop),
        seed=params.seed,
        logprobs=params.logprobs,
        stream_interval=params.stream_interval or 1,
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
    for name, kind in _NESTED.items():
        if isinstance(further.get(name), Mapping):  # it has come from another node
            further[name] = kind(**{key: value for key, value in further[name].items() if not key.startswith("_")})
    if request.schema:
        further["structured_outputs"] = StructuredOutputsParams(json=dict(request.schema))
    if request.schema is not None:
        further["repetition_detection"] = REPETITION
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


def check_limits(params: SamplingParams, generation_config: dict[str, Any], eos_token: int | None) -> None:
    """Raise RequestRefused for parameters that vLLM accepts, but that kill a worker on a GPU or block this process.

    The model's own stop tokens, which vLLM adds to those of the request, count too. They come from the model's
    `generation_config` and its tokenizer's `eos_token`.
    """
    for name, listed in (("allowed_token_ids", params.allowed_token_ids), ("logit_bias", params.logit_bias)):
        if len(listed or ()) > LISTED_TOKENS:
            raise RequestRefused(f"{name}: at most {LISTED_TOKENS} tokens are possible; got {len(listed or ())}")
    words = params.bad_words or ()
    if len(words) > BAD_WORDS or sum(len(word.encode()) for word in words) > BAD_WORDS_BYTES:
        raise RequestRefused(
            f"bad_words: at most {BAD_WORDS} words, with {BAD_WORDS_BYTES} bytes in all of them, are possible"
        )
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
