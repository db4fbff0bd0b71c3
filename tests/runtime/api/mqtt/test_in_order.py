"""Completions reported in the order in which tasks were added."""

import asyncio

from runtime.api.mqtt.in_order import InOrder


async def test_items_are_reported_in_order_whatever_order_their_tasks_end_in() -> None:
    reported: list[str] = []
    pending = InOrder(reported.append)
    ends = {name: asyncio.Event() for name in "abc"}
    tasks = {name: asyncio.create_task(end.wait()) for name, end in ends.items()}
    for name, task in tasks.items():
        pending.add(name, task)
    for name, expected in {"b": [], "a": ["a", "b"], "c": ["a", "b", "c"]}.items():
        ends[name].set()
        await tasks[name]
        await asyncio.sleep(0)
        assert reported == expected


async def test_a_failed_task_stops_the_reports() -> None:
    async def fail() -> None:
        raise ValueError

    reported: list[str] = []
    pending = InOrder(reported.append)
    failing, ending = asyncio.create_task(fail()), asyncio.create_task(asyncio.sleep(0))
    pending.add("a", failing)
    pending.add("b", ending)
    await asyncio.wait([failing, ending])
    await asyncio.sleep(0)
    assert reported == []


async def test_wait_for_room_waits_for_the_item_at_the_limit() -> None:
    pending: InOrder[asyncio.Event] = InOrder(lambda item: None)
    ends = [asyncio.Event() for _ in range(3)]
    for end in ends:
        pending.add(end, asyncio.create_task(end.wait()))
    waiting = asyncio.create_task(pending.wait_for_room(2))
    ends[0].set()
    await asyncio.sleep(0.01)
    assert not waiting.done()
    ends[1].set()
    await waiting
