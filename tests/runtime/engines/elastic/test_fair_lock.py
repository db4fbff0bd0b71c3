"""The fair lock excludes, serves in order, and survives the death of any process. Tested with real processes."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from runtime.engines.elastic.fair_lock import FairLock

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60
"""Upper bound for waits that take milliseconds on an idle machine. Only a hang takes this long."""


class Contestants:
    """Processes that take one lock. Each appends its name to a log once it has the lock."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "lock"
        self._log = folder / "log"
        self._log.touch()
        self._processes: list[BaseProcess] = []

    @property
    def taken(self) -> str:
        """The names of those that have had the lock, in order."""
        return self._log.read_text()

    def write(self, name: str) -> None:
        with self._log.open("a") as log:
            log.write(name)

    def start(self, name: str, hold: Callable[[], object]) -> Any:
        """Start a process that takes the lock once, and calls `hold` while it has it.

        Wait until it has the lock or, if there is a holder, its place among the waiters.
        """
        tickets, free = self._tickets(), not self.taken
        process = self.started(self._once, name, hold)
        wait_until(lambda: bool(self.taken) if free else self._tickets() > tickets)
        return process

    def started(self, run: Callable[..., None], *arguments: object) -> Any:
        process = FORK.Process(target=run, args=arguments, daemon=True)
        process.start()
        self._processes.append(process)
        return process

    def _once(self, name: str, hold: Callable[[], object]) -> None:
        with FairLock(self.file):
            self.write(name)
            hold()

    def _tickets(self) -> int:
        return int.from_bytes(self.file.read_bytes(), "little") if self.file.exists() else 0

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture
def contestants(tmp_path: Path) -> Iterator[Contestants]:
    running = Contestants(tmp_path)
    yield running
    running.kill()


def wait_until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def forever() -> None:
    time.sleep(10 * PATIENCE_S)


def test_waiters_get_the_lock_in_the_order_of_their_arrival(contestants: Contestants) -> None:
    release = FORK.Event()
    contestants.start("h", release.wait)
    for name in "abcdef":
        contestants.start(name, lambda: None)
    release.set()
    wait_until(lambda: contestants.taken == "habcdef")


def test_a_process_that_asks_again_at_once_does_not_overtake_a_waiter(contestants: Contestants) -> None:
    """`flock` fails this: the process that releases the lock takes it again before a waiter has woken up."""

    together = FORK.Barrier(3)

    def greedy(name: str) -> None:
        lock = FairLock(contestants.file)
        together.wait(PATIENCE_S)
        for _ in range(100):
            with lock:
                contestants.write(name)
                time.sleep(0.001)

    for process in [contestants.started(greedy, name) for name in "abc"]:
        process.join(PATIENCE_S)
    turns = contestants.taken
    assert len(turns) == 300
    all_compete = turns[max(map(turns.index, "abc")) : min(map(turns.rindex, "abc"))]
    assert len(all_compete) > 100, turns
    again = sum(first == second for first, second in pairwise(all_compete))
    assert again <= len(all_compete) // 10, turns  # a busy machine can deschedule a process between two of its turns


def test_two_processes_never_hold_the_lock_together(contestants: Contestants) -> None:
    inside = FORK.RawValue("i", 0)
    worst = FORK.RawValue("i", 0)

    def enter_often() -> None:
        lock = FairLock(contestants.file)
        for _ in range(300):
            with lock:
                inside.value += 1
                worst.value = max(worst.value, inside.value)
                time.sleep(0)
                inside.value -= 1

    processes = [contestants.started(enter_often) for _ in range(4)]
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    assert worst.value == 1
    assert inside.value == 0


def test_a_killed_holder_releases_the_lock(contestants: Contestants) -> None:
    holder = contestants.start("h", forever)
    contestants.start("n", lambda: None)
    assert contestants.taken == "h"
    holder.kill()
    wait_until(lambda: contestants.taken == "hn")


def test_a_killed_waiter_loses_its_place_and_nobody_overtakes_the_holder(contestants: Contestants) -> None:
    release = FORK.Event()
    contestants.start("h", release.wait)
    waiter = contestants.start("k", lambda: None)
    contestants.start("n", lambda: None)
    waiter.kill()
    waiter.join()
    time.sleep(0.1)
    assert contestants.taken == "h"
    release.set()
    wait_until(lambda: contestants.taken == "hn")


def test_an_error_while_waiting_gives_the_place_up(contestants: Contestants, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(lock: FairLock) -> None:
        raise KeyboardInterrupt

    lock = FairLock(contestants.file)
    with monkeypatch.context() as patch:
        patch.setattr(FairLock, "_wait_for_earlier_tickets", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lock.__enter__()
    contestants.start("n", lambda: None)
    wait_until(lambda: contestants.taken == "n")
    lock.close()
