"""Requests, chunks and errors cross the wire unchanged; anything else is refused."""

from dataclasses import replace

import pytest
from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from agents.role import Message
from runtime.cluster import wire
from runtime.engines import engine_client
from runtime.engines.handle import Recalled
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.sampling import to_params, with_params
from runtime.errors import Death, EngineDead, EngineError, RequestQuarantined, RequestRefused

PLAIN = GenerateRequest("job/1", (Message("user", "1+1"),), 0.0, 1.0, 64, since_s=100.0)


def crossed(request: GenerateRequest) -> GenerateRequest:
    """Send a request from a machine whose clock says 130 to one whose clock says 7."""
    [message] = wire.to_agent.decode(wire.encode([wire.generate(3, "solver@a:0", request, 130.0)]))
    assert isinstance(message, wire.Generate)
    assert (message.number, message.replica) == (3, "solver@a:0")
    return wire.received(message, 7.0)


@pytest.mark.parametrize(
    "request_",
    [
        PLAIN,
        replace(PLAIN, resume_tokens=(1, 2, 3), has_begun=True, stop=("x",), seed=2**62, priority=1),
        replace(PLAIN, schema={"type": "object", "properties": {"a": {"enum": [1, None, "é"]}}}),
        replace(
            PLAIN, rendered={"prompt": "x", "prompt_token_ids": [1, 2]}, generate_options={"reasoning_ended": True}
        ),
    ],
)
def test_a_request_is_the_same_with_the_age_of_its_job(request_: GenerateRequest) -> None:
    assert crossed(request_) == replace(request_, since_s=7.0 - 30.0)


def test_every_sampling_parameter_of_vllm_arrives() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_k=3,
        min_tokens=2,
        logit_bias={5: 1.5, 6: -100.0},
        bad_words=["no"],
        stop_token_ids=[7],
        structured_outputs=StructuredOutputsParams(regex="[0-9]+"),
        output_kind=RequestOutputKind.DELTA,
    )
    request = with_params(replace(PLAIN, since_s=None), params)
    assert repr(to_params(crossed(request), 100)) == repr(to_params(request, 100))


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(RequestRefused, match="cannot be sent to engine solver@a:0"):
        crossed(replace(PLAIN, sampling_params={"logit_bias": {1: 2**70}}))


def test_log_probabilities_arrive_as_vllm_has_them() -> None:
    chunk = Chunk("a", (1,), 2.0, 3, logprobs=({1: Logprob(-0.5, 1, "a"), 2: Logprob(float("-inf"), None, None)},))
    [message] = wire.from_agent.decode(wire.encode([wire.Streamed(1, chunk)]))
    assert isinstance(message, wire.Streamed)
    assert [engine_client._logprobs(each) for each in message.chunk.logprobs] == [dict(chunk.logprobs[0])]


@pytest.mark.parametrize(
    "error",
    [EngineDead("gone", Death.KILLED), EngineError("bad"), RequestRefused("too long"), Recalled("drains")],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_raised_as_they_were(error: Exception) -> None:
    [message] = wire.from_agent.decode(wire.encode([wire.Ended(1, wire.failure_of(error))]))
    assert isinstance(message, wire.Ended)
    assert message.failure is not None
    raised = wire.error_of(message.failure)
    assert (type(raised), str(raised)) == (type(error), str(error))
    assert getattr(raised, "death", None) is getattr(error, "death", None)


def test_an_unknown_error_names_its_class() -> None:
    assert str(wire.error_of(wire.failure_of(KeyError("x")))) == "KeyError: 'x'"
    assert type(wire.error_of(wire.failure_of(RequestQuarantined("x")))) is EngineError


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91\x92\xa7Unknown\x01", wire.encode([wire.Abort(1)])[:-1]])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(wire.CannotRead):
        wire.to_agent.decode(data)
