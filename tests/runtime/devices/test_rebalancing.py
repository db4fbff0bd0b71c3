"""Replicas are added or moved from busy devices to those with little work, and removed when they are idle."""

from dataclasses import replace

import pytest

from runtime.devices.rebalancing import IDLE_S, Action, DeviceLoad, EngineRange, PlacementView, ReplicaView, decide

LASTED = DeviceLoad(1000, above_s=100, below_s=100)
SOLVER = EngineRange(least=1, most=2, needed_bytes=400, start_s=10, devices=frozenset({"1"}))


def replica(name: str, in_flight: int, idle_s: float = 0) -> ReplicaView:
    engine, _, device = name.partition("@")
    return ReplicaView(name, engine, device, in_flight, idle_s)


def view(*replicas: ReplicaView, solver: EngineRange = SOLVER, other: DeviceLoad = LASTED) -> PlacementView:
    return PlacementView(replicas, {"solver": solver}, {"0": LASTED, "1": other})


BUSY = replica("planner@0", 30), replica("solver@0", 50), replica("critic@1", 2)


def test_a_replica_of_the_busiest_engine_is_added_to_the_idlest_device() -> None:
    (action,) = decide(view(*BUSY))
    assert action == Action(("solver", "1"), None, action.reason, "0")
    assert action.reason == "device 0 has 80 requests (50 of solver) and device 1 2, for 100 s"


@pytest.mark.parametrize(
    "changed",
    [
        {"solver": replace(SOLVER, devices=frozenset())},
        {"solver": replace(SOLVER, needed_bytes=1001)},
        {"solver": replace(SOLVER, start_s=34)},
        {"other": replace(LASTED, below_s=29)},
    ],
    ids=["has a replica there", "does not fit", "starts too slowly", "has not lasted"],
)
def test_nothing_is_added_where_it_would_not_help(changed: dict[str, EngineRange | DeviceLoad]) -> None:
    assert decide(view(*BUSY, **changed)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("loads", [(40, 20), (17, 1), (8, 0), (0, 0)])
def test_devices_with_similar_loads_are_left_alone(loads: tuple[int, int]) -> None:
    assert decide(view(replica("solver@0", loads[0]), replica("critic@1", loads[1]))) == []


def test_an_engine_that_has_all_its_replicas_moves_if_another_one_stays_busy() -> None:
    single = replace(SOLVER, most=1)
    (action,) = decide(view(*BUSY, solver=single))
    assert (action.add, action.remove) == (("solver", "1"), "solver@0")
    alone = replica("planner@0", 3), replica("solver@0", 50), replica("critic@1", 2)
    assert decide(view(*alone, solver=single)) == []


def test_a_replica_without_requests_is_removed_while_more_than_the_fewest_are_left() -> None:
    idle = replica("solver@0", 0, IDLE_S), replica("solver@1", 0, IDLE_S)
    (action,) = decide(view(*idle))
    assert (action.add, action.remove, action.reason) == (None, "solver@0", "no request for 60 s")
    assert decide(view(*idle, solver=replace(SOLVER, least=2))) == []
    assert decide(view(idle[0], replica("solver@1", 0, IDLE_S - 1)))[0].remove == "solver@0"
    assert decide(view(replica("solver@0", 0, IDLE_S))) == []


def test_engines_with_a_fixed_number_of_replicas_are_left_alone() -> None:
    assert decide(PlacementView(BUSY, {}, {"0": LASTED, "1": LASTED})) == []


def test_many_busy_devices_are_relieved_at_once_by_different_ones() -> None:
    replicas = [replica(f"e{n}@{n}", 100 if n < 3 else 0) for n in range(8)]
    devices = {str(n): LASTED for n in range(8)}
    bounds = {f"e{n}": EngineRange(1, 2, 400, 10, frozenset(map(str, range(8))) - {str(n)}) for n in range(8)}
    actions = decide(PlacementView(replicas, bounds, devices))
    added = [action.add for action in actions if action.add is not None]
    assert {engine for engine, _ in added} == {"e0", "e1", "e2"}
    assert len({device for _, device in added}) == 3
    assert not {device for _, device in added} & {"0", "1", "2"}


def test_another_device_is_tried_if_the_idlest_has_no_room() -> None:
    devices = {"0": LASTED, "1": replace(LASTED, free_bytes=0), "2": LASTED}
    bounds = replace(SOLVER, devices=frozenset({"1", "2"}))
    (action,) = decide(PlacementView((*BUSY, replica("critic@2", 3)), {"solver": bounds}, devices))
    assert action.add == ("solver", "2")


def test_devices_of_a_change_under_way_are_left_alone() -> None:
    assert decide(view(*BUSY, other=replace(LASTED, changing=True))) == []
    busy_changes = {"0": replace(LASTED, changing=True), "1": LASTED}
    assert decide(PlacementView(BUSY, {"solver": SOLVER}, busy_changes)) == []


def test_an_engine_with_too_few_replicas_gets_one() -> None:
    bounds = replace(SOLVER, least=2, most=2)
    (action,) = decide(view(replica("solver@0", 0), solver=bounds))
    assert (action.add, action.reason) == (("solver", "1"), "1 replicas are fewer than 2")


def test_an_engine_with_too_many_replicas_loses_the_least_busy_one() -> None:
    bounds = replace(SOLVER, most=1)
    (action,) = decide(view(replica("solver@0", 5), replica("solver@1", 3), solver=bounds))
    assert (action.add, action.remove) == (None, "solver@1")
    stuck = replace(replica("solver@1", 3), can_be_removed=False)
    assert decide(view(replica("solver@0", 5), stuck, solver=bounds))[0].remove == "solver@0"


def test_of_idle_replicas_one_that_sleeps_is_removed_first() -> None:
    sleeping = replace(replica("solver@1", 0, IDLE_S), ready=False)
    (action,) = decide(view(replica("solver@0", 0, IDLE_S), sleeping))
    assert action.remove == "solver@1"


def test_engines_that_lost_their_replicas_go_to_devices_with_room_for_all_of_them() -> None:
    lost = replace(SOLVER, devices=frozenset({"0", "1"}), needed_bytes=600)
    engines = {"planner": lost, "solver": lost, "critic": lost}
    devices = {"0": DeviceLoad(1000), "1": DeviceLoad(700), "2": DeviceLoad(5000, changing=True)}
    added = [action.add for action in decide(PlacementView([], engines, devices))]
    assert added == [("planner", "0"), ("solver", "1")]  # the critic waits for room


def test_an_engine_with_too_many_replicas_loses_one_at_a_time() -> None:
    bounds = EngineRange(least=2, most=2, needed_bytes=400, start_s=10, devices=frozenset())
    three = [replica("solver@0", 5), replica("solver@1", 0, IDLE_S), replica("solver@2", 3)]
    devices = dict.fromkeys("012", LASTED)
    (action,) = decide(PlacementView(three, {"solver": bounds}, devices))
    assert action.remove == "solver@1"
