"""An engine as vLLM's serving layer sees it: the parts of an EngineClient that vLLM's handlers use.

vLLM's handlers render a request, ask the client for replies to it, and format them. They run in this process, so that
requests can be rendered, and then wait, while the engine's own process sleeps or restarts.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from vllm import RequestOutput, SamplingParams
from vllm.config import VllmConfig
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.input_processor import InputProcessor

from runtime.engines.merge import merge
from runtime.engines.request import Chunk, GenerateRequest
from runtime.engines.sampling import with_params
from runtime.errors import InputError, TroupeError

T = TypeVar("T")
Generate = Callable[[GenerateRequest], AsyncGenerator[Chunk, None]]
CHOICES_MAX = 16
"""The most choices of one request."""
SEED_MAX = 2**63 - 1
"""vLLM stores seeds in 64 bits."""
WHOLE_INTERVAL = 64
"""Tokens per chunk of a reply that is not streamed to the client."""


class Replies:
    """The replies that one API request asks for, in one or several calls of `EngineClient.generate`.

    No call yields anything before every reply has its first token. So if the engine refuses one of them, the answer to
    the client has not begun. `error` is what the engine raised, or None.
    """

    def __init__(self) -> None:
        self.error: TroupeError | None = None
        self._calls: list[AsyncGenerator[Any, None]] = []
        self._unstarted = 0
        self._started = asyncio.Event()

    @property
    def have_started(self) -> bool:
        """Return True if every reply has its first token."""
        return self._started.is_set()

    def expect(self, call: AsyncGenerator[Any, None], replies: int) -> None:
        """Count the replies of a call. All calls are made before the first of them is iterated."""
        self._calls.append(call)
        self._unstarted += replies

    def note_start(self) -> None:
        """Note that one more reply has its first token."""
        self._unstarted -= 1
        if self._unstarted <= 0:
            self._started.set()

    async def hold(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield the items of a call once every reply has started."""
        async with aclosing(items):
            async for item in items:
                if not self.have_started:
                    await self._started.wait()
                yield item

    async def close(self) -> None:
        """Abort what still runs. vLLM's handlers leave it to the garbage collector to close what they iterate."""
        for call in self._calls:
            with suppress(RuntimeError):  # the garbage collector is closing it
                await call.aclose()


replies_of_request: ContextVar[Replies] = ContextVar("replies_of_request")
"""The replies of the API request that is being handled. It must be set when a handler is called."""


class EngineClient:
    """One engine, as vLLM's handlers use an EngineClient. `generate` sends a request to the engine."""

    errored = False  # a supervised engine restarts, and requests wait for it

    def __init__(self, config: VllmConfig, generate: Generate) -> None:
        self.vllm_config = config
        self.model_config = config.model_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self._generate = generate

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Accept everything: requests wait in the engine's queue."""

    def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **unused: object,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the `n` replies to a rendered prompt, or return them whole, as `sampling_params.output_kind` says.

        Of vLLM's other arguments, which are in `unused`, the priority and the tracing headers of a client have no
        effect. Raises InputError for what an engine might not survive or could not repeat: log probabilities of a
        prompt, which take memory that no engine has set aside, too many choices, and a seed that is too large for `n`
        replies.
        """
        if sampling_params.prompt_logprobs is not None:
            raise InputError(
                "prompt_logprobs: log probabilities of a prompt, by this key or by echo, are not supported"
            )
        if sampling_params.n > CHOICES_MAX:
            raise InputError(f"n: must be at most {CHOICES_MAX}; got {sampling_params.n}")
        seed_max = SEED_MAX - sampling_params.n + 1
        if sampling_params.seed is not None and sampling_params.seed > seed_max:
            raise InputError(f"seed: must be at most {seed_max}, so that each of the n choices has its own seed")
        options = {"reasoning_ended": reasoning_ended, "reasoning_parser_kwargs": reasoning_parser_kwargs}
        request = with_params(
            GenerateRequest(
                request_id="",
                messages=(),
                temperature=1.0,
                top_p=1.0,
                max_tokens=None,
                rendered=prompt,
                generate_options={name: value for name, value in options.items() if value is not None},
            ),
            sampling_params,
        )
        _check_encodable(request.generate_options)
        replies = replies_of_request.get()
        whole = sampling_params.output_kind is RequestOutputKind.FINAL_ONLY
        if whole:
            request = replace(request, stream_interval=WHOLE_INTERVAL)
        choices = range(sampling_params.n)
        parts = merge([self._reply(request_id, choice, _nth(request, choice), replies) for choice in choices])
        call = replies.hold(parts)
        if whole:
            call = _whole(call)
        replies.expect(call, len(choices))
        return call

    async def _reply(
        self, request_id: str, choice: int, request: GenerateRequest, replies: Replies
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream the reply to a request as vLLM's outputs."""
        started = False
        try:
            async with aclosing(self._generate(request)) as chunks:
                async for chunk in chunks:
                    if not started:
                        replies.note_start()
                        started = True
                    yield _output(request_id, choice, request, chunk)
        except TroupeError as error:
            replies.error = error
            raise


async def _whole(parts: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
    """Yield one output, put together from the streamed parts of all choices."""
    async with aclosing(parts):
        whole = await anext(parts)
        async for part in parts:
            whole.add(part, aggregate=True)
    whole.outputs.sort(key=lambda output: output.index)
    yield whole


def _check_encodable(options: Mapping[str, Any]) -> None:
    """Raise InputError for values that cannot be sent to the engine's process, such as integers beyond 64 bits."""
    try:
        msgspec.msgpack.encode(options)
    except (OverflowError, TypeError, RecursionError) as error:
        raise InputError(f"chat_template_kwargs: {error}") from None


def _nth(request: GenerateRequest, choice: int) -> GenerateRequest:
    """Return the request for one of several choices, with an id and a seed of its own, as vLLM has it."""
    seed = None if request.seed is None else request.seed + choice
    return replace(request, request_id=uuid.uuid4().hex, seed=seed)


def _logprobs(of_token: Mapping[int, Any]) -> dict[int, Logprob]:
    """Return vLLM's log probabilities, which come from another node as plain mappings."""
    return {token: each if isinstance(each, Logprob) else Logprob(**each) for token, each in of_token.items()}


def _output(request_id: str, choice: int, request: GenerateRequest, chunk: Chunk) -> RequestOutput:
    """Return a chunk of a choice as vLLM's output. It is `finished` if the choice is."""
    assert request.rendered is not None
    output = CompletionOutput(
        index=choice,
        text=chunk.text,
        token_ids=list(chunk.token_ids),
        cumulative_logprob=None,
        logprobs=[_logprobs(each) for each in chunk.logprobs] or None,
        finish_reason=chunk.finish,
        stop_reason=chunk.stop,
    )
    return RequestOutput(
        request_id=request_id,
        prompt=request.rendered.get("prompt"),
        prompt_token_ids=request.rendered["prompt_token_ids"],
        prompt_logprobs=None,
        outputs=[output],
        finished=chunk.finish is not None,
        num_cached_tokens=chunk.cached_tokens,
    )
