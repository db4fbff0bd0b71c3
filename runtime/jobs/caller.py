"""Makes one call of a workflow: asks the seat's engine, runs the tools that the model calls, and reads its reply."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import count

from agents import cut_json, tool_protocol
from agents.role import Message, Reply, ReplyUnusable, Role, Task
from agents.tool import ToolSpec
from agents.tool_protocol import ToolCall, ToolUse
from agents.workflow import RoleCall, Unusable
from runtime.engines.request import Engine, GenerateRequest
from runtime.engines.usage import Usage
from runtime.errors import PluginError
from runtime.events import CallBegan, CallEnded, CallFailed, CallPaused, Listener, ToolCalled, ToolReturned
from runtime.jobs.plugin_calls import call_plugin
from runtime.jobs.reply_record import ReplyRecord
from runtime.jobs.run import Run
from runtime.jobs.team import Seat
from runtime.jobs.tool_record import ToolRecord, task_id
from runtime.tools.toolbox import Toolbox

INTERRUPTED = "the call was interrupted when the runtime stopped; it may or may not have had its effect"
"""The output that a model reads if its tool call was interrupted and must not be repeated."""
TOOL_CALL_TOKENS = 1024
"""The lowest token limit of a reply that may be a tool call. A seat's `max_tokens` overrides it."""
_ENDED_EARLY = {"length": "cut off at {} tokens", "repetition": "ended because it repeated itself"}


class Caller:
    """A caller of the team's engines and tools, for all jobs.

    `price` is the cost of a whole GPU per hour. A call is charged for its share of the memory of each GPU over time.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        toolbox: Toolbox,
        listener: Listener,
        price: float | None,
        stream_interval: int,
    ) -> None:
        self._engines = engines
        self._toolbox = toolbox
        self._tell = listener
        self._price = price
        self._stream_interval = stream_interval
        self._requests = count()

    async def ask(self, run: Run, seat: Seat, call: RoleCall, past: Sequence[ToolRecord] = ()) -> ReplyRecord:
        """Make a call and return its reply. `past` holds the call's tool calls before the runtime stopped, in order."""
        records = run.tools.setdefault(call.number, [])
        earlier = run.earlier_uses.get(task_id(call), ()) if run.earlier_uses else ()
        for record in past:
            if record.belongs_to(call):
                records.append(await self._finished(run, record))
        tools = self._toolbox.specs(seat.tools)
        while True:
            run.begin_call()
            used = Usage()
            uses = [*earlier, *(record.use for record in records if record.use is not None)]
            request = self.request(run, seat, call, tools, uses)
            try:
                text, finish = await self._generate(run.job.id, seat, call, request, used)
            finally:
                run.add(seat.name, used)
            note = _ENDED_EARLY.get(finish or "", "").format(request.max_tokens)
            step = self._read(seat, call, request, text, note, bool(tools))
            if isinstance(step, ToolCall) and len(uses) >= seat.tool_calls_max:  # the engine did not enforce the schema
                step = Unusable(f"the model has made all its {seat.tool_calls_max} tool calls")
            if not isinstance(step, ToolCall):
                note = "" if isinstance(step, Unusable) else note
                return ReplyRecord(call.number, seat.name, step, used, note, tuple(records))
            records.append(await self._use_tool(run, ToolRecord(call.number, seat.name, task_id(call), step, used)))

    def _read(
        self, seat: Seat, call: RoleCall, request: GenerateRequest, text: str, note: str, with_tools: bool
    ) -> ToolCall | Reply | Unusable:
        """Return the tool call or the reply in a model's text. `note` says why the text ended early, if it did.

        If a JSON reply ended early, read the values that are complete.
        """
        try:
            if with_tools:
                step = tool_protocol.read(text, ended_early=bool(note))
                if isinstance(step, ToolCall):
                    return step
                text = step
            elif note and request.schema is not None:
                text = cut_json.closed(text)
            return _parsed(seat, text, call.task)
        except ReplyUnusable as error:
            return Unusable(f"{error} ({note})" if note else str(error))

    async def _use_tool(self, run: Run, record: ToolRecord) -> ToolRecord:
        """Log a tool call, make the call, and log its output."""
        run.begin_call()
        called = _called(run, record)
        await run.log(called)
        self._tell(called)
        return await self._run_tool(run, record)

    async def _finished(self, run: Run, record: ToolRecord) -> ToolRecord:
        """Return a past tool call with its output. Repeat an interrupted call if its tool is idempotent."""
        if record.use is not None:
            return record
        if self._toolbox.may_repeat(record.call.tool):
            self._tell(_called(run, record))
            return await self._run_tool(run, record)
        return await self._returned(run, record, ToolUse(record.call, INTERRUPTED, failed=True))

    async def _run_tool(self, run: Run, record: ToolRecord) -> ToolRecord:
        """Run a tool. Tell the listeners that its call needs no engine until the tool returns."""
        self._tell(CallPaused(run.job.id, record.seat, True))
        try:
            return await self._returned(run, record, await self._toolbox.use(record.call))
        finally:
            self._tell(CallPaused(run.job.id, record.seat, False))

    async def _returned(self, run: Run, record: ToolRecord, use: ToolUse) -> ToolRecord:
        returned = ToolReturned(run.job.id, record.number, record.seat, use)
        await run.log(returned)
        self._tell(returned)
        return replace(record, use=use)

    async def _generate(
        self, job: str, seat: Seat, call: RoleCall, request: GenerateRequest, usage: Usage
    ) -> tuple[str, str | None]:
        """Return the text of a reply and its finish reason. Add the request's usage to `usage`, even if it fails."""
        clock = asyncio.get_running_loop().time
        began = CallBegan(job, call.number, seat.name, seat.engine, request, call.retries)
        self._tell(began)
        if began.trace_headers:
            request = replace(request, trace_headers=began.trace_headers)
        asked_s, account = clock(), request.account
        pieces: list[str] = []
        times_s: list[float] = []
        tokens: list[int] = []
        prompt_tokens = 0
        finish: str | None = None
        try:
            async with aclosing(self._engines[seat.engine].generate(request)) as chunks:
                async for chunk in chunks:
                    prompt_tokens = chunk.prompt_tokens
                    pieces.append(chunk.text)
                    times_s.append(chunk.time_s)
                    tokens.append(len(chunk.token_ids))
                    finish = chunk.finish
        except BaseException as error:
            self._tell(CallFailed(job, seat.name, request.request_id, type(error).__name__, str(error)))
            raise
        finally:
            charge, seconds = account.charge, clock() - asked_s
            cost = None if self._price is None else self._price / 3600 * account.device_seconds
            charged = charge.byte_seconds, charge.engine_seconds, cost, charge.waking_byte_seconds
            usage.add(Usage(prompt_tokens, sum(tokens), seconds, *charged))
        timing = asked_s, tuple(times_s), tuple(tokens)
        self._tell(CallEnded(job, seat.name, seat.engine, *timing, prompt_tokens, request.request_id, finish))
        return "".join(pieces), finish

    def request(
        self, run: Run, seat: Seat, call: RoleCall, tools: Sequence[ToolSpec] = (), uses: Sequence[ToolUse] = ()
    ) -> GenerateRequest:
        """Return the request for a reply. The model may call `tools`. `uses` are the finished tool calls."""
        job, sampling = run.job, seat.sampling
        temperature = sampling.temperature if job.temperature is None else job.temperature
        if call.variation:
            temperature = max(temperature, sampling.retry_temperature)
        messages = call_plugin(f"the role at {seat.name}: messages()", lambda: _messages(seat.role, call.task))
        schema = call_plugin(f"the role at {seat.name}: schema()", lambda: seat.role.schema(call.task))
        max_tokens = call_plugin(f"the role at {seat.name}: max_tokens()", lambda: seat.role.max_tokens(call.task))
        max_tokens = min(max_tokens, sampling.max_tokens)
        if tools:
            left = max(seat.tool_calls_max - len(uses), 0)
            messages = tuple(tool_protocol.messages(messages, tools, uses, left))
            schema = tool_protocol.schema(tools, schema, left)
            max_tokens = max(max_tokens, TOOL_CALL_TOKENS) if left else max_tokens
        return GenerateRequest(
            request_id=f"{job.id}/{call.number}/{next(self._requests)}",
            messages=messages,
            temperature=temperature,
            top_p=sampling.top_p,
            max_tokens=seat.max_tokens or max_tokens,
            stop=sampling.stop,
            seed=None if job.seed is None or not temperature else _seed(job.seed, call, len(uses)),
            schema=schema,
            priority=job.priority,
            since_s=run.since_s,
            stream_interval=self._stream_interval,
            session=f"{job.id}/{call.seat}",
        )


def _called(run: Run, record: ToolRecord) -> ToolCalled:
    return ToolCalled(run.job.id, record.number, record.seat, record.task, record.call, record.used)


def _parsed(seat: Seat, text: str, task: Task) -> Reply:
    """Return the reply in a text. Raise ReplyUnusable if the role cannot read it, PluginError if the role is broken."""
    reply = call_plugin(f"the role at {seat.name}: parse()", lambda: seat.role.parse(text, task))
    if type(reply) is not task.reply_type:  # the journal reads it back as exactly this type
        raise PluginError(
            f"the role at {seat.name}: parse() returned {reply!r}; the reply to {type(task).__name__} must be "
            f"{task.reply_type.__name__}"
        )
    return reply


def _messages(role: Role, task: Task) -> tuple[Message, ...]:
    messages = tuple(role.messages(task))
    if not messages or not all(isinstance(message, Message) for message in messages):
        raise TypeError(f"{messages!r} is not a list of Message, or is empty")
    return messages


def _seed(seed: int, call: RoleCall, tool_uses: int) -> int:
    """Derive a call's seed from its content, so that the reply does not depend on jobs that run at the same time."""
    text = f"{seed}/{call.seat}/{call.task!r}/{call.variation}/{call.retries}"
    if tool_uses:
        text = f"{text}/{tool_uses}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
