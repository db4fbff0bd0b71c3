"""The fake engine keeps the contract of EngineHandle, so that tests that use it hold for a real engine."""

import asyncio
from dataclasses import replace

import pytest

from agents.role import Message
from runtime.engines.fake import FakeEngine, FakeMemory, Processor, ServiceTime
from runtime.engines.grant import Applied, Deferred, Grant, Rejected, Superseded
from runtime.engines.handle import EngineState
from runtime.engines.request import GenerateRequest
from runtime.errors import EngineDead, EngineError

pytestmark = pytest.mark.virtual_time

REQUEST = GenerateRequest("r", (Message("user", "one two three"),), 0.0, 1.0, 16)


def now_s() -> float:
    """Return the virtual seconds since the test began."""
    return asyncio.get_running_loop().time()


async def test_each_word_is_a_token_and_is_counted() -> None:
    async with FakeEngine("f", lambda request: "four five six", time_scale=0.01) as engine:
        chunks = [chunk async for chunk in engine.generate(REQUEST)]
        assert "".join(chunk.text for chunk in chunks) == "four five six"
        assert [chunk.finish for chunk in chunks] == [None, None, "stop"]
        assert [chunk.time_s for chunk in chunks] == sorted(chunk.time_s for chunk in chunks)
        stats = engine.stats()
        assert (stats.requests, stats.prompt_tokens, stats.completion_tokens) == (1, 3, 3)
    assert engine.stats().state is EngineState.CLOSED


async def test_reply_stops_at_max_tokens() -> None:
    async with FakeEngine("f", lambda request: " ".join("abcdefghijklmnopqrstuvwxyz")) as engine:
        chunks = [chunk async for chunk in engine.generate(REQUEST)]
        assert len("".join(chunk.text for chunk in chunks).split()) == 16
        assert chunks[-1].finish == "length"


async def test_at_most_max_num_seqs_requests_run() -> None:
    times = ServiceTime(step_s=0.01, token_s=0, prefill_s=0)
    async with FakeEngine("f", lambda request: "one", max_num_seqs=2, times=times, time_scale=1) as engine:

        async def ask() -> None:
            async for _ in engine.generate(REQUEST):
                pass

        tasks = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.sleep(0.005)
        assert (engine.stats().running, engine.stats().waiting) == (2, 3)
        await asyncio.gather(*tasks)
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)


async def test_waiting_requests_are_admitted_by_priority_then_job_age() -> None:
    times = ServiceTime(step_s=0.005, token_s=0, prefill_s=0)
    served: list[str] = []
    async with FakeEngine("f", lambda request: "one", max_num_seqs=1, times=times, time_scale=1) as engine:

        async def ask(name: str, priority: int, since_s: float) -> None:
            async for _ in engine.generate(replace(REQUEST, request_id=name, priority=priority, since_s=since_s)):
                pass
            served.append(name)

        runs = asyncio.create_task(ask("runs", 5, 9))
        await asyncio.sleep(0.001)
        await asyncio.gather(runs, ask("young", 5, 3), ask("old", 5, 1), ask("urgent", 1, 5), ask("as old", 5, 1))
    assert served == ["runs", "urgent", "old", "as old", "young"]


async def test_reply_takes_the_modelled_time() -> None:
    times = ServiceTime(step_s=0.02, token_s=0, prefill_s=0.01)
    async with FakeEngine("f", lambda request: "a b c", times=times, time_scale=1) as engine:
        async for _ in engine.generate(REQUEST):
            pass
        assert now_s() == pytest.approx(3 * 0.01 + 3 * 0.02)


async def test_a_killed_engine_ends_streams_and_refuses_requests() -> None:
    async with FakeEngine("f", lambda request: "a b c", time_scale=1) as engine:
        stream = engine.generate(REQUEST)
        await anext(stream)
        engine.kill()
        with pytest.raises(EngineDead):
            await anext(stream)
        with pytest.raises(EngineDead):
            await anext(engine.generate(REQUEST))
    assert engine.stats().running == 0


async def test_an_engine_that_has_not_started_refuses_requests() -> None:
    with pytest.raises(EngineError, match="starting"):
        await anext(FakeEngine("f", lambda request: "a").generate(REQUEST))


MEMORY = FakeMemory(device=1000, fixed=100, floor=50, token=1, block_tokens=19)
"""A request of 3 prompt tokens and up to 15 reply tokens takes one block of 19 tokens."""


async def run_many(engine: FakeEngine, count: int) -> tuple[list[asyncio.Task[None]], list[int]]:
    """Send many requests at once. Return their tasks, and a list of how many requests ran at each chunk."""
    running: list[int] = []

    async def ask() -> None:
        running.extend([engine.stats().running async for _ in engine.generate(REQUEST)])

    tasks = [asyncio.create_task(ask()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks, running


async def test_memory_and_concurrency_limit_running_requests_and_change_live() -> None:
    times = ServiceTime(step_s=0.005, token_s=0, prefill_s=0)
    async with FakeEngine("f", lambda request: "one two", times=times, time_scale=1, memory=MEMORY) as engine:
        assert isinstance(
            await engine.resize(Grant(0.15, 64, 2048)), Applied
        )  # leaves 50 for the KV cache: two requests
        tasks, running = await run_many(engine, 10)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert max(running) == 2
        assert isinstance(await engine.resize(Grant(0.5, 3, 2048)), Applied)
        await asyncio.gather(*tasks)
        assert max(running) == 3
        assert engine.stats().kv_cache_usage == 0


async def test_shrink_waits_for_running_requests_then_preempts_them() -> None:
    times = ServiceTime(step_s=0.1, token_s=0, prefill_s=0)
    async with FakeEngine(
        "f", lambda request: "a b c d e f g h i j", times=times, time_scale=1, memory=MEMORY
    ) as engine:
        tasks, _ = await run_many(engine, 8)
        await asyncio.sleep(0.01)
        first = await engine.resize(Grant(0.2, 64, 2048), grace_s=60)
        second = await engine.resize(Grant(0.15, 64, 2048), grace_s=0.01)
        assert isinstance(first, Deferred)
        assert isinstance(second, Deferred)
        assert (first.held_bytes, second.held_bytes) == (8 * 19 - 100, 8 * 19 - 50)
        assert isinstance(await first.settled, Superseded)
        forced = await second.settled
        assert isinstance(forced, Applied)
        assert forced.preempted == 6
        assert engine.stats().preemptions == 6
        assert isinstance(await engine.resize(Grant(0.3, 64, 2048)), Applied)
        await asyncio.sleep(0.11)  # after one step all run again
        third = await engine.resize(Grant(0.16, 64, 2048), grace_s=60)
        assert isinstance(third, Deferred)
        await asyncio.gather(*tasks)
        assert isinstance(await third.settled, Applied)


async def test_impossible_grants_are_rejected() -> None:
    engine = FakeEngine("f", lambda request: "one", memory=MEMORY)
    assert isinstance(await engine.resize(Grant(0.5, 64, 2048)), Rejected)
    await engine.start()
    assert isinstance(await engine.resize(Grant(0.1, 64, 2048)), Rejected)
    engine.kill()
    assert isinstance(await engine.resize(Grant(0.5, 64, 2048)), Rejected)


async def test_requests_that_outgrow_the_memory_are_preempted_and_completed() -> None:
    times = ServiceTime(step_s=0.001, token_s=0, prefill_s=0)
    memory = FakeMemory(device=1000, fixed=100, floor=10, token=1)
    grant = Grant(0.12, 64, 2048)  # leaves 20 for the KV cache: room for three prompts, but not for three replies
    words = " ".join("abcdefgh")
    async with FakeEngine("f", lambda r: words, times=times, time_scale=1, memory=memory, grant=grant) as engine:

        async def ask() -> str:
            return "".join([chunk.text async for chunk in engine.generate(REQUEST)])

        assert await asyncio.gather(*(ask() for _ in range(5))) == [words] * 5
        assert engine.stats().preemptions > 0


async def test_engines_on_one_processor_slow_each_other_down() -> None:
    processor = Processor(lanes=1)
    times = ServiceTime(step_s=0.02, token_s=0, prefill_s=0)
    engines = [FakeEngine("f", lambda r: "a b", times=times, time_scale=1, processor=processor) for _ in range(2)]

    async def ask(engine: FakeEngine) -> None:
        async for _ in engine.generate(REQUEST):
            pass

    async with engines[0], engines[1]:
        await asyncio.gather(*map(ask, engines))
        assert now_s() >= 2 * 0.02 * 1.5


async def test_calls_from_one_process_are_made_one_after_another() -> None:
    times = ServiceTime(step_s=0.001, token_s=0, prefill_s=0, call_s=0.02)
    front = Processor(lanes=1)
    engines = [FakeEngine("f", lambda r: "a", times=times, time_scale=1, front=front) for _ in range(2)]
    async with engines[0], engines[1]:
        tasks = [task for engine in engines for task in (await run_many(engine, 2))[0]]
        await asyncio.gather(*tasks)
        assert now_s() >= 4 * 0.02


async def test_long_prompt_is_computed_over_several_steps() -> None:
    times = ServiceTime(step_s=1, token_s=0, prefill_s=0.01)
    grant = Grant(1.0, 64, 100)
    lengths = {"short": (10, 6), "long": (250, 1)}
    async with FakeEngine(
        "f", lambda r: "a", times=times, time_scale=1, grant=grant, lengths=lambda r: lengths[r.request_id]
    ) as engine:

        async def ask(name: str) -> list[float]:
            return [now_s() async for _ in engine.generate(replace(REQUEST, request_id=name))]

        short = asyncio.create_task(ask("short"))
        await asyncio.sleep(1.5)  # the short request is in its second step
        long = asyncio.create_task(ask("long"))
        # Steps 3 to 5 decode one token of the short request and compute 99, 99 and 52 tokens of the long prompt.
        ends = [1.1, 2.1, 2.1 + 1.99, 2.1 + 2 * 1.99, 2.1 + 2 * 1.99 + 1.52]
        assert await short == pytest.approx([*ends, ends[-1] + 1])
        assert await long == pytest.approx([ends[-1]])


async def test_prompts_are_computed_in_order_of_admission() -> None:
    times = ServiceTime(step_s=1, token_s=0, prefill_s=0)
    grant = Grant(1.0, 64, 100)
    async with FakeEngine(
        "f", lambda r: "a", times=times, time_scale=1, grant=grant, lengths=lambda r: (150, 1)
    ) as engine:

        async def ask() -> float:
            async for _ in engine.generate(REQUEST):
                pass
            return now_s()

        tasks = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0.5)
        assert (engine.stats().running, engine.stats().waiting) == (1, 2)  # the first prompt fills the first step
        assert await asyncio.gather(*tasks) == pytest.approx([2, 3, 5])


async def test_preempted_request_computes_its_prompt_and_its_reply_again() -> None:
    times = ServiceTime(step_s=1, token_s=0, prefill_s=0.01)
    memory = FakeMemory(device=1000, fixed=100, floor=10, token=1)
    async with FakeEngine(
        "f", lambda r: "a b c", times=times, time_scale=1, memory=memory, lengths=lambda r: (10, 3)
    ) as engine:

        async def ask() -> list[float]:
            return [now_s() async for _ in engine.generate(REQUEST)]

        task = asyncio.create_task(ask())
        await asyncio.sleep(1.5)
        shrink = await engine.resize(Grant(0.112, 64, 2048), grace_s=0.1)  # at 2.1 s, and the request needs 13 bytes
        assert isinstance(shrink, Deferred)
        assert isinstance(await shrink.settled, Applied)
        await asyncio.sleep(4 - now_s())
        await engine.resize(Grant(1.0, 64, 2048))
        assert await task == pytest.approx([1.1, 2.1, 4 + 1.12])


async def test_modelled_lengths_count_tokens_and_keep_the_text() -> None:
    async with FakeEngine("f", lambda r: "the answer", time_scale=1, lengths=lambda r: (700, 90)) as engine:
        chunks = [chunk async for chunk in engine.generate(replace(REQUEST, max_tokens=2))]
        assert "".join(chunk.text for chunk in chunks) == "the answer"
        assert sum(len(chunk.token_ids) for chunk in chunks) == 90
        assert (chunks[-1].prompt_tokens, chunks[-1].finish) == (700, "stop")
        resumed = [chunk async for chunk in engine.generate(replace(REQUEST, resume_tokens=(0,) * 88))]
        assert [chunk.text for chunk in resumed] == ["the", " answer"]
