"""OpenAI's and Anthropic's APIs for the engine of a seat, by vLLM's own handlers.

vLLM's handlers check requests, apply chat templates, parse tool calls and reasoning, and format answers. What they
generate comes from our engines, through an EngineClient. Only this module of the service imports vLLM.
"""

import asyncio
import difflib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMError
from vllm.renderers.online_renderer import OnlineRenderer

from runtime.api.http import sse
from runtime.api.http.errors import error_body
from runtime.engines.engine_client import EngineClient, Generate, Replies, replies_of_request
from runtime.engines.spec import EngineSpec
from runtime.engines.vllm_config import vllm_config
from runtime.errors import ConfigError, InputError, NotFound, TroupeError

Body = Mapping[str, Any]
"""The JSON object in the body of a request."""
NOT_IMPLEMENTED = 501
NOT_FOUND = 404
_PARAMETER = re.compile(r" ?\(parameter=.*\)$")
"""Matches the end of vLLM's messages, which repeats the field and its value. We name the field in front."""
_UNCHECKED = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""vLLM's validators raise these for a value of a wrong type, because they use it before they check it."""
PROMPTS_MAX = 64
"""The most prompts of one request."""
REFUSED = frozenset(
    {
        *("background", "ec_transfer_params", "kv_transfer_params", "mm_payload", "priority", "prompt_embeds"),
        *("repetition_detection", "return_mm_kwargs", "use_beam_search", "vllm_xargs"),
    }
)
"""Keys of vLLM's requests that have no meaning here. A request that sets one is refused."""
WITHOUT_EFFECT = frozenset(
    {
        *("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"),
        *("service_tier", "store", "stream_options", "verbosity"),
    }
)
"""Keys of OpenAI's API that vLLM does not know and that do not change an answer."""


@dataclass(frozen=True)
class Api:
    """One kind of request. `request` is vLLM's class for it, or a union of classes."""

    request: Any

    @property
    def classes(self) -> tuple[type[BaseModel], ...]:
        """vLLM's classes for the request: one, or the alternatives."""
        return (self.request,) if isinstance(self.request, type) else self.request.__args__

    @cached_property
    def keys(self) -> frozenset[str]:
        """The keys that a request may have."""
        return frozenset(key for cls in self.classes for key in _keys_of(cls)).union(WITHOUT_EFFECT) - REFUSED

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.request)

    def read(self, body: Body) -> Any:
        """Return vLLM's request for a body. Raises InputError or RequestValidationError, which name the field."""
        for key in sorted(body.keys() - self.keys):
            if body[key] not in (None, False, 0):
                similar = difflib.get_close_matches(key, self.keys, 1)
                raise InputError(
                    f"{key}: this key is not supported{f'; did you mean {similar[0]}?' if similar else ''}"
                )
        try:
            request = self._adapter.validate_python(dict(body))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        except VLLMError:
            raise
        except _UNCHECKED as error:
            raise InputError(f"the body is malformed: {type(error).__name__}: {error}") from None
        prompt = getattr(request, "prompt", None)
        if isinstance(prompt, list) and len(prompt) > PROMPTS_MAX and not isinstance(prompt[0], int):
            raise InputError(f"prompt: a request may have at most {PROMPTS_MAX} prompts; got {len(prompt)}")
        return request


def _keys_of(cls: type[BaseModel]) -> Iterator[str]:
    for name, declared in cls.model_fields.items():
        yield name
        if declared.alias:
            yield declared.alias


CHAT = Api(ChatCompletionRequest)
COMPLETION = Api(CompletionRequest)
RESPONSES = Api(ResponsesRequest)
MESSAGES = Api(AnthropicMessagesRequest)
COUNT_TOKENS = Api(AnthropicCountTokensRequest)
TOKENIZE = Api(TokenizeCompletionRequest | TokenizeChatRequest)
DETOKENIZE = Api(DetokenizeRequest)
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT_TOKENS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}


class EngineFront:
    """The part of an engine in this process that renders requests to it. The seats that it serves share it."""

    def __init__(self, name: str, spec: EngineSpec, generate: Generate) -> None:
        config = vllm_config(spec)
        self.name = name
        self.spec = spec
        self.client: Any = EngineClient(config, generate)
        self.tools = {
            "enable_auto_tools": spec.tool_call_parser is not None,
            "tool_parser": spec.tool_call_parser,
            "reasoning_parser": config.structured_outputs_config.reasoning_parser,
        }
        self.template = {"chat_template": None, "chat_template_content_format": "auto"}
        try:
            self.renderer = OnlineRenderer(
                config.model_config, self.client.renderer, request_logger=None, **self.template, **self.tools
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"engines.{name}: tool_call_parser or reasoning_parser cannot be used: {error}"
            ) from error
        self.renderer.warmup()


class SeatModel:
    """The model of a seat. Each method answers one kind of request, given its body.

    They raise InputError or RequestValidationError for a bad request, and whatever the engine raises.
    """

    def __init__(self, seat: str, front: EngineFront) -> None:
        models = OpenAIServingModels(front.client, [BaseModelPath(name=seat, model_path=front.spec.model)])
        shared = {"online_renderer": front.renderer, "request_logger": None}
        answers = {**shared, "enable_prompt_tokens_details": True}
        self._front = front
        self._chat = OpenAIServingChat(front.client, models, "assistant", **answers, **front.template, **front.tools)
        self._completion = OpenAIServingCompletion(front.client, models, **answers)
        self._responses = OpenAIServingResponses(front.client, models, **answers, **front.template, **front.tools)
        self._responses.enable_store = False  # stored responses would be kept for ever, and read by everyone
        self._messages = AnthropicServingMessages(
            front.client, models, "assistant", **answers, **front.template, **front.tools
        )
        self._tokens = ServingTokenization(models, **shared, **front.template)

    async def chat(self, body: Body) -> Response:
        """Answer POST /v1/chat/completions."""
        return await self._answer(CHAT, body, self._chat.create_chat_completion)

    async def complete(self, body: Body) -> Response:
        """Answer POST /v1/completions."""
        return await self._answer(COMPLETION, body, self._completion.create_completion)

    async def respond(self, body: Body) -> Response:
        """Answer POST /v1/responses."""
        return await self._answer(RESPONSES, body, self._responses.create_responses, _ResponsesStream())

    async def message(self, body: Body) -> Response:
        """Answer POST /v1/messages, Anthropic's API."""
        return await self._answer(MESSAGES, body, self._messages.create_messages, _MessagesStream(), exclude_none=True)

    async def count_tokens(self, body: Body) -> Response:
        """Answer POST /v1/messages/count_tokens, Anthropic's API."""
        return await self._answer(COUNT_TOKENS, body, self._messages.count_tokens, exclude_none=True)

    async def tokenize(self, body: Body) -> Response:
        """Answer POST /tokenize."""
        return await self._answer(TOKENIZE, body, self._tokens.create_tokenize)

    async def detokenize(self, body: Body) -> Response:
        """Answer POST /detokenize."""
        return await self._answer(DETOKENIZE, body, self._tokens.create_detokenize)

    async def _answer(
        self,
        api: Api,
        body: Body,
        handler: Callable[[Any, None], Awaitable[Any]],
        stream: "_Stream | None" = None,
        exclude_none: bool = False,
    ) -> Response:
        """Return the response for what a handler returns for a body: an object or a stream."""
        replies = Replies()
        replies_of_request.set(replies)
        self._check_tools(body)
        streams = False
        try:
            result = await handler(api.read(body), None)
            _raise_if_cancelled()  # vLLM returns an error for a cancellation
            if isinstance(result, ErrorResponse):
                raise self._refusal(result, body)
            if isinstance(result, BaseModel):
                return JSONResponse(result.model_dump(mode="json", by_alias=True, exclude_none=exclude_none))
            events = _events(result, stream or _Stream(), replies)
            response = await sse.response_once_started(events, lambda: replies.have_started)
            streams = True
            return response
        except Exception as error:  # vLLM raises all kinds of errors for a request that a model cannot serve
            if replies.error is not None:
                raise replies.error from None
            if isinstance(error, TroupeError | RequestValidationError) or replies.have_started:
                raise
            raise self._refusal(create_error_response(error), body, error) from error
        finally:
            if not streams:
                await replies.close()

    def _refusal(self, response: ErrorResponse, body: Body, error: Exception | None = None) -> Exception:
        """Return an InputError for vLLM's error response, or, if the fault is vLLM's or ours, the error behind it."""
        detail = response.error
        if detail.code >= 500 and detail.code != NOT_IMPLEMENTED:
            return error or RuntimeError(detail.message)
        message = _PARAMETER.sub("", (detail.message.splitlines() or ["the model cannot serve this request"])[0])
        message = message.replace(self._front.spec.model, self._front.name)
        if detail.code == NOT_FOUND:
            return NotFound(message)
        names_a_field = detail.param and re.split(r"[.\[]", detail.param)[0] in body
        return InputError(f"{detail.param}: {message}" if names_a_field else message)

    def _check_tools(self, body: Body) -> None:
        """Raise InputError if the model may call tools, but nothing can parse its calls."""
        if body.get("tools") and body.get("tool_choice") != "none" and not self._front.spec.tool_call_parser:
            raise InputError(
                f"tools: engine {self._front.name} has no parser for the tool calls of its model; set "
                f"engines.{self._front.name}.tool_call_parser to one of vLLM's, for example hermes"
            )


class _Stream:
    """A stream of server-sent events, made from the items of a handler's stream. Here, the items are events already."""

    def event(self, item: Any) -> str:
        """Return the event for an item of the stream."""
        return str(item)

    def failed(self, error: TroupeError) -> str:
        """Return the last event of a stream that an error ends."""
        return sse.format_event(error_body(error))


class _ResponsesStream(_Stream):
    """A stream of the Responses API: vLLM yields its events as objects."""

    def __init__(self) -> None:
        self._number = -1

    def event(self, item: Any) -> str:
        self._number = item.sequence_number
        return f"event: {item.type}\ndata: {item.model_dump_json(by_alias=True)}\n\n"

    def failed(self, error: TroupeError) -> str:
        detail = error_body(error)["error"]
        body = {**detail, "type": "error", "sequence_number": self._number + 1, "code": str(detail["code"])}
        return sse.format_event(body, kind="error")


class _MessagesStream(_Stream):
    """A stream of Anthropic's API."""

    def failed(self, error: TroupeError) -> str:
        detail = {"type": "api_error", "message": str(error)}
        return sse.format_event({"type": "error", "error": detail}, kind="error")


async def _events(items: AsyncGenerator[Any, None], stream: _Stream, replies: Replies) -> AsyncGenerator[str, None]:
    """Yield the events of a stream. An error is raised before all replies have started, and is the last event after.

    When the engine fails, vLLM writes an error of its own into most streams. The engine's error replaces it.
    """
    try:
        async with aclosing(items):
            async for item in items:
                if replies.error is not None:
                    raise replies.error
                yield stream.event(item)
    except Exception as error:
        if not replies.have_started:
            raise
        if not isinstance(error, TroupeError):
            logging.getLogger(__name__).exception("a stream failed")
            error = TroupeError(f"the stream failed: {type(error).__name__}")
        yield stream.failed(error)
    finally:
        await replies.close()


def _raise_if_cancelled() -> None:
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
