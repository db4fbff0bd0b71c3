"""scripts/drill_residency.py finds what it looks for: over fake engines, of which one gives a wrong reply once."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.engines.fake import FakeEngine, FakeMemory, ServiceTime
from runtime.engines.grant import Grant
from runtime.engines.handle import EngineState
from runtime.engines.ledger import Ledger
from runtime.engines.request import GenerateRequest
from runtime.engines.sharing import Sharing
from runtime.engines.supervised import SupervisedEngine
from scripts import drill_residency

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("wrong", [0, 1])
async def test_every_wrong_reply_is_counted(wrong: int) -> None:
    asked = 0

    def reply(request: GenerateRequest) -> str:
        nonlocal asked
        asked += 1
        return "wrong" if wrong and asked == drill_residency.REQUESTS + 5 else "one two three four"

    def make(grant: Grant | None) -> FakeEngine:
        times = ServiceTime(step_s=0.5, start_s=0.5)
        memory = FakeMemory(device=1000, fixed=300, floor=50)
        return FakeEngine("e", reply, times=times, time_scale=1, memory=memory, grant=grant or Grant(0.35, 64, 2048))

    engines: dict[str, SupervisedEngine] = {}
    ledger = Ledger(800)
    for name in drill_residency.NAMES:
        engines[name] = SupervisedEngine(name, make, patience=drill_residency.PATIENCE)
        await engines[name].start()
        await engines[name].sleep()
        ledger.claim(name, 0)

    def kill_fake(fleet: Any, rng: random.Random) -> EngineState | None:
        engine = rng.choice(list(engines.values()))
        engine.kill()
        return engine.stats().state

    fleet: Any = SimpleNamespace(engines=engines, sharing=Sharing(engines, ledger))
    outcome = await drill_residency.drill(fleet, sleeps=10, kill=kill_fake)
    assert outcome.wrong == wrong
    assert outcome.kills > 0
    assert outcome.wakes >= outcome.sleeps >= 10
    assert 0 < outcome.most_bytes <= 800
    for engine in engines.values():
        await engine.close()
