"""Items are reported in their order, whatever order their tasks end in."""

import asyncio

from runtime.api.mqtt.in_order import InOrder


async def test_items_are_reported_in_their_order_once_those_before_them_have_succeeded() -> None:
    reported: list[str] = []
    under_way = InOrder(reported.append)
    ends = {name: asyncio.Event() for name in "abc"}
    tasks = {name: asyncio.create_task(end.wait()) for name, end in ends.items()}
    for name, task in tasks.items():
        under_way.add(name, task)
    for name, then in {"b": [], "a": ["a", "b"], "c": ["a", "b", "c"]}.items():
        ends[name].set()
        await tasks[name]
        await asyncio.sleep(0)
        assert reported == then


async def test_nothing_is_reported_past_a_task_that_failed() -> None:
    async def fail() -> None:
        raise ValueError

    reported: list[str] = []
    under_way = InOrder(reported.append)
    failing, ending = asyncio.create_task(fail()), asyncio.create_task(asyncio.sleep(0))
    under_way.add("a", failing)
    under_way.add("b", ending)
    await asyncio.wait([failing, ending])
    await asyncio.sleep(0)
    assert reported == []


async def test_room_waits_until_fewer_are_under_way() -> None:
    under_way: InOrder[asyncio.Event] = InOrder(lambda item: None)
    ends = [asyncio.Event() for _ in range(3)]
    for end in ends:
        under_way.add(end, asyncio.create_task(end.wait()))
    waiting = asyncio.create_task(under_way.room(2))
    ends[0].set()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    ends[1].set()
    await waiting
