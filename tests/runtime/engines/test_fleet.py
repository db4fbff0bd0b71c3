"""The engines of one device, over fake ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.engines.fake import FakeEngine, FakeMemory
from runtime.engines.fleet import Fleet, Measured
from runtime.engines.grant import Grant
from runtime.engines.spec import EngineSpec

pytestmark = pytest.mark.virtual_time

MIB = 1 << 20
SPEC = EngineSpec(model="some/model")


class FakeLauncher:
    """A launcher whose engines are fake ones on a device of 2,000 MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reports: dict[str, Any] = {}

    async def prepare(self) -> Any:
        def make(name: str, *others: Any) -> FakeEngine:
            grant = next((each for each in others if isinstance(each, Grant)), None)
            memory = FakeMemory(device=2000 * MIB, fixed=100 * MIB, floor=50 * MIB)
            return FakeEngine(name, lambda request: "x", memory=memory, grant=grant or Grant(0.2, 64, 2048))

        return SimpleNamespace(VllmEngine=make)


async def test_a_device_without_engines_has_the_size_of_another_until_its_first_engine_has_started(
    tmp_path: Path,
) -> None:
    elsewhere = FakeEngine("s", lambda request: "x", memory=FakeMemory(1000 * MIB, 100 * MIB, 50 * MIB))
    await elsewhere.start()
    launcher: Any = FakeLauncher(tmp_path)
    async with Fleet({}, tmp_path, launcher=launcher) as fleet:
        fleet.add_absent("s", SPEC, Measured(elsewhere.limits, start_s=1.0))
        assert fleet.sharing.ledger.full_budget_bytes == 1000 * MIB
        await fleet.sharing.wake("s")
        assert fleet.sharing.ledger.full_budget_bytes == fleet.sharing.ledger.budget_bytes == 2000 * MIB
