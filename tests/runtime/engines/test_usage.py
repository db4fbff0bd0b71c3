"""The charges of requests and the idle time add up to what the engine held."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engines.request import GenerateRequest
from runtime.engines.usage import Held, UsageMeter, Waiting
from runtime.simulation import virtual_time


def request(since_s: float | None = None) -> GenerateRequest:
    return GenerateRequest("r", (), temperature=0, top_p=1, max_tokens=1, since_s=since_s)


async def call(meter: UsageMeter, begins_s: float, seconds: float, since_s: float | None = None) -> tuple[float, float]:
    await asyncio.sleep(begins_s)
    before = meter.charged()
    with meter.request(request(since_s).rank(asyncio.get_running_loop().time()), since_s):
        await asyncio.sleep(seconds)
    spent = meter.charged() - before
    return spent.byte_seconds, spent.engine_seconds


def test_a_request_that_is_held_pays_for_what_the_engine_keeps_asleep_and_for_the_wake() -> None:
    async def work() -> None:
        meter = UsageMeter()
        meter.hold(100)
        await asyncio.sleep(1)
        meter.hold(5, Held.ASLEEP)
        held = asyncio.create_task(call(meter, 2, 10))
        await asyncio.sleep(4)
        before = meter.charged()
        meter.hold(60, Held.WAKING)
        await asyncio.sleep(5)
        meter.hold(80)
        assert await held == pytest.approx((2 * 5 + 5 * 60 + 3 * 80, 10))
        assert (meter.charged() - before).waking_byte_seconds == pytest.approx(300)
        spent = {held: (each.seconds, each.byte_seconds) for held, each in meter.spent().items()}
        assert spent[Held.ASLEEP] == pytest.approx((4, 20))
        assert spent[Held.WAKING] == pytest.approx((5, 300))
        assert spent[Held.RESIDENT] == pytest.approx((4, 100 + 3 * 80))
        assert meter.idle.byte_seconds == pytest.approx(110)

    virtual_time.run(work())


def test_concurrent_requests_share_memory_and_time_equally() -> None:
    async def work() -> list[tuple[float, float]]:
        meter = UsageMeter()
        meter.hold(100)
        charges = list(await asyncio.gather(call(meter, 1, 4), call(meter, 3, 4)))
        assert (meter.arrived, meter.finished, meter.in_flight) == (2, 2, 0)
        assert meter.idle.byte_seconds == pytest.approx(100)  # the first second
        return charges

    # Each request is alone for 2 s and shares the engine for 2 s.
    first, second = virtual_time.run(work())
    assert first == pytest.approx((300, 3))
    assert second == pytest.approx((300, 3))


def test_waiting_requests_are_those_that_arrived_after_the_running_ones() -> None:
    async def work() -> None:
        meter = UsageMeter()
        calls = [asyncio.create_task(call(meter, begins, 10)) for begins in (1, 2, 5)]
        await asyncio.sleep(6)
        assert [meter.waiting(running) for running in (0, 1, 2, 3)] == [
            Waiting(1, 1),
            Waiting(2, 2),
            Waiting(5, 5),
            None,
        ]
        await asyncio.sleep(6)
        assert meter.waiting(0) == Waiting(5, 5)
        await asyncio.gather(*calls)

    virtual_time.run(work())


def test_requests_of_older_jobs_count_as_running_first() -> None:
    async def work() -> None:
        meter = UsageMeter()
        calls = [asyncio.create_task(call(meter, *times)) for times in ((5, 10, 5), (6, 10, 6), (8, 10, 1))]
        await asyncio.sleep(9)
        assert [meter.waiting(running) for running in (0, 1, 2, 3)] == [
            Waiting(5, 1),
            Waiting(5, 5),
            Waiting(6, 6),
            None,
        ]
        await asyncio.gather(*calls)

    virtual_time.run(work())


@settings(max_examples=100)
@given(
    calls=st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 10)), min_size=1, max_size=12),
    sizes=st.lists(st.integers(0, 1000), max_size=5),
)
def test_charges_and_idle_time_add_up_to_what_was_held(calls: list[tuple[float, float]], sizes: list[int]) -> None:
    async def work() -> None:
        meter = UsageMeter()
        meter.hold(500)
        held = 0.0
        clock = asyncio.get_running_loop().time

        async def resize() -> None:
            nonlocal held
            now_bytes, since_s = 500, clock()
            for size in sizes:
                await asyncio.sleep(3)
                held += now_bytes * (clock() - since_s)
                now_bytes, since_s = size, clock()
                meter.hold(size)
            await asyncio.sleep(40 - clock())
            held += now_bytes * (clock() - since_s)

        resizing = asyncio.create_task(resize())
        charged = await asyncio.gather(*(call(meter, begins, seconds) for begins, seconds in calls))
        await resizing
        meter.charged()
        assert sum(spent for spent, _ in charged) + meter.idle.byte_seconds == pytest.approx(held)
        assert sum(seconds for _, seconds in charged) + meter.idle.engine_seconds == pytest.approx(40)

    virtual_time.run(work())


@settings(max_examples=100)
@given(
    requests=st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=12),
    running=st.integers(0, 12),
)
def test_the_waiting_requests_are_all_but_those_of_the_lowest_ranks(
    requests: list[tuple[int, float, float]], running: int
) -> None:
    async def work() -> None:
        meter = UsageMeter()
        open_requests = []
        for rank, arrives_s, lasts_s in sorted(requests, key=lambda each: each[1]):
            await asyncio.sleep(arrives_s - asyncio.get_running_loop().time())
            request = meter.request(rank, -lasts_s)
            request.__enter__()
            open_requests.append((rank, arrives_s, -lasts_s, request))
        for _ in range(len(open_requests) // 3):
            open_requests.pop(1)[-1].__exit__(None, None, None)
        waiting = sorted(open_requests, key=lambda each: each[0])[running:]
        expected = Waiting(min(e[1] for e in waiting), min(e[2] for e in waiting)) if waiting else None
        assert meter.waiting(running) == expected

    virtual_time.run(work())
