"""The fake engine keeps the seam's promises, so that what is tested over it holds for a real one."""

import asyncio
import time

import pytest

from agents.role import Message
from runtime.engines.base import EngineState, GenerateRequest
from runtime.engines.fake import FakeEngine, ServiceTime
from runtime.errors import EngineDead, EngineError

REQUEST = GenerateRequest("r", (Message("user", "one two three"),), 0.0, 1.0, 16)


async def test_it_streams_a_word_a_token_and_counts_them() -> None:
    async with FakeEngine("f", lambda request: "four five six", time_scale=0.01) as engine:
        chunks = [chunk async for chunk in engine.generate(REQUEST)]
        assert "".join(chunk.text for chunk in chunks) == "four five six"
        assert [chunk.finish for chunk in chunks] == [None, None, "stop"]
        assert [chunk.time_s for chunk in chunks] == sorted(chunk.time_s for chunk in chunks)
        stats = engine.stats()
        assert (stats.requests, stats.prompt_tokens, stats.completion_tokens) == (1, 3, 3)
    assert engine.stats().state is EngineState.CLOSED


async def test_it_stops_at_max_tokens() -> None:
    async with FakeEngine("f", lambda request: " ".join("abcdefghijklmnopqrstuvwxyz")) as engine:
        chunks = [chunk async for chunk in engine.generate(REQUEST)]
        assert len("".join(chunk.text for chunk in chunks).split()) == 16
        assert chunks[-1].finish == "length"


async def test_no_more_than_max_num_seqs_run() -> None:
    times = ServiceTime(step_s=0.01, token_s=0, prefill_s=0)
    async with FakeEngine("f", lambda request: "one", max_num_seqs=2, times=times, time_scale=1) as engine:

        async def ask() -> None:
            async for _ in engine.generate(REQUEST):
                pass

        asked = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.sleep(0.005)
        assert (engine.stats().running, engine.stats().waiting) == (2, 3)
        await asyncio.gather(*asked)
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)


async def test_its_time_follows_the_model() -> None:
    times = ServiceTime(step_s=0.02, token_s=0, prefill_s=0.01)
    async with FakeEngine("f", lambda request: "a b c", times=times, time_scale=1) as engine:
        started = time.monotonic()
        async for _ in engine.generate(REQUEST):
            pass
        assert time.monotonic() - started >= 3 * 0.01 + 3 * 0.02


async def test_a_failed_engine_ends_streams_and_refuses_more() -> None:
    async with FakeEngine("f", lambda request: "a b c", time_scale=1) as engine:
        stream = engine.generate(REQUEST)
        await anext(stream)
        engine.kill()
        with pytest.raises(EngineDead):
            await anext(stream)
        with pytest.raises(EngineDead):
            await anext(engine.generate(REQUEST))
    assert engine.stats().running == 0


async def test_an_engine_that_was_not_started_refuses() -> None:
    with pytest.raises(EngineError, match="starting"):
        await anext(FakeEngine("f", lambda request: "a").generate(REQUEST))
