"""Each replica is expected to get its part of what its engine expects."""

from functools import partial

import pytest

from agents.role import Message
from runtime.control.forecast import Forecast
from runtime.devices.expected_calls import ExpectedCalls
from runtime.engines import replicas
from runtime.engines.fake import FakeEngine, ServiceTime
from runtime.engines.grant import Grant
from runtime.engines.request import GenerateRequest
from runtime.engines.supervised import SupervisedEngine
from runtime.events import JobAdvanced
from runtime.residency.call_times import CallTimes

pytestmark = pytest.mark.virtual_time
SEATS = {"planner": "planner", "solver": "solver"}


REQUEST = GenerateRequest("r", (Message("user", "go on"),), 0.0, 1.0, 100)


def _make(name: str, grant: Grant | None) -> FakeEngine:
    return FakeEngine(name, lambda request: "word " * 50, times=ServiceTime(step_s=0.01), time_scale=1, grant=grant)


class Rig:
    """A planner on device 0 and a solver on both, with one job whose planner is called and whose solver will be."""

    def __init__(self) -> None:
        names = ("planner@0", "solver@0", "solver@1")
        self.engines = {name: SupervisedEngine(name, partial(_make, name)) for name in names}
        self.forecast, self.call_times = Forecast(), CallTimes()
        for listener in (self.forecast, self.call_times):
            listener.seat(SEATS)
        self.replicas = replicas.gathered(self.engines)
        self.on = {
            device: ExpectedCalls(
                [name for name in names if name.endswith(device)], self.replicas, self.forecast, self.call_times
            )
            for device in ("0", "1")
        }

    async def start(self) -> "Rig":
        for engine in self.engines.values():
            await engine.start()
        return self

    def call(self, due: dict[str, int], ahead: dict[str, int], replied: str = "") -> None:
        event = JobAdvanced("j", replied, due, ahead, frozenset(SEATS))
        self.forecast.on_event(event)
        self.call_times.on_event(event)


async def test_replicas_that_are_ready_share_the_calls() -> None:
    rig = await Rig().start()
    rig.call({"planner": 3}, {"solver": 4})
    assert rig.on["0"].open_calls() == {"planner@0": 3, "solver@0": 0}
    assert rig.on["0"].coming() == {"planner@0": 0, "solver@0": 2}
    assert rig.on["1"].coming() == {"solver@1": 2}
    rig.call({"solver": 3}, {}, "planner")
    assert rig.on["1"].open_calls() == {"solver@1": 2}  # rounded up


async def test_calls_are_expected_at_the_replica_that_serves() -> None:
    rig = await Rig().start()
    await rig.engines["solver@0"].sleep()
    rig.call({"solver": 3}, {})
    assert rig.on["0"].open_calls() == {"planner@0": 0, "solver@0": 0}
    assert rig.on["1"].open_calls() == {"solver@1": 3}
    assert "solver@0" not in rig.on["0"].next_call_s()


async def test_if_no_replica_serves_one_of_them_expects_all_calls() -> None:
    rig = await Rig().start()
    for name in ("solver@0", "solver@1"):
        await rig.engines[name].sleep()
    rig.call({"solver": 3}, {})
    expected = [rig.on["0"].open_calls()["solver@0"], rig.on["1"].open_calls()["solver@1"]]
    assert sorted(expected) == [0, 3]


async def test_nothing_is_expected_of_absent_replicas() -> None:
    rig = await Rig().start()
    for name in ("solver@0", "solver@1"):
        await rig.engines[name].leave()
    rig.call({"solver": 3}, {})
    assert [rig.on["0"].open_calls()["solver@0"], rig.on["1"].open_calls()["solver@1"]] == [0, 0]


async def test_replies_of_an_engine_on_another_device_lead_to_calls() -> None:
    rig = await Rig().start()
    rig.call({"planner": 1}, {"solver": 1})
    rig.call({"solver": 1}, {}, "planner")
    rig.call({"planner": 2}, {}, "solver")
    streams = [rig.replicas["planner"].generate(REQUEST) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    assert rig.on["1"].soon({}) == {"solver@1": pytest.approx(1.0)}  # one for each, of which it gets half
    for stream in streams:
        await stream.aclose()
