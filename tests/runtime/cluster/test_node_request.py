"""The request for nodes to Ray's autoscaler is renewed, bounded, and withdrawn."""

from typing import Any

import pytest

from runtime.cluster import ray_nodes
from runtime.cluster.nodes import NODES_S
from runtime.cluster.ray_nodes import RENEW_S, _NodeRequest
from runtime.config import Cluster


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ray_nodes, "time", clock)
    return clock


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    sent: list[list[float]] = []

    def request_resources(bundles: list[dict[str, Any]]) -> None:
        sent.append([bundle["GPU"] for bundle in bundles])

    monkeypatch.setattr(ray_nodes, "request_resources", request_resources)
    return sent


def request(nodes: int | None = 3) -> _NodeRequest:
    return _NodeRequest(Cluster(nodes=nodes, nodes_with="GPU"))


def test_missing_nodes_are_as_small_as_the_smallest_that_is_there(clock: Clock, sent: list[list[float]]) -> None:
    asking = request()
    asking.renew([])
    asking.renew([8])
    asking.renew([4, 8])
    assert sent == [[1, 1, 1], [8, 8, 8], [8, 4, 4]]


def test_at_most_as_many_nodes_as_configured_are_kept(clock: Clock, sent: list[list[float]]) -> None:
    request().renew([1, 2, 4, 8])
    assert sent == [[8, 4, 2]]


def test_a_request_is_sent_again_because_another_team_may_have_replaced_it(
    clock: Clock, sent: list[list[float]]
) -> None:
    asking = request()
    for _ in range(3):
        asking.renew([8, 8, 8])
    clock.now_s += RENEW_S + 1
    asking.renew([8, 8, 8])
    assert sent == [[8, 8, 8]] * 2


def test_nodes_that_do_not_come_are_no_longer_asked_for(clock: Clock, sent: list[list[float]]) -> None:
    asking = request()
    asking.renew([8, 8, 8])
    clock.now_s += NODES_S
    asking.renew([8, 8, 8])
    asking.renew([8, 8])  # one is lost
    clock.now_s += NODES_S
    asking.renew([8, 8])
    assert sent[-2:] == [[8, 8, 8], [8, 8]]


def test_nothing_is_asked_for_after_the_end(clock: Clock, sent: list[list[float]]) -> None:
    asking = request()
    asking.renew([8])
    asking.end()
    asking.renew([8, 8])
    assert sent == [[8, 8, 8], []]


def test_without_a_number_nothing_is_asked_for_or_withdrawn(clock: Clock, sent: list[list[float]]) -> None:
    asking = request(nodes=None)
    asking.renew([8])
    asking.end()
    assert sent == []
