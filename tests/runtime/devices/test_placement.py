"""Each replica starts on the device with the most room."""

import pytest

from runtime.devices.placement import others, place
from runtime.engines.spec import EngineSpec
from runtime.errors import ConfigError


def spec(share: float, **changes: object) -> EngineSpec:
    return EngineSpec.model_validate({"model": "m", "gpu_memory_utilization": share, **changes})


def placed(engines: dict[str, EngineSpec], *devices: str) -> dict[str, list[str]]:
    return {device: [*of_device] for device, of_device in place(engines, devices).items()}


def test_on_one_device_replicas_have_the_names_of_their_engines_in_the_order_of_the_configuration() -> None:
    assert placed({"a": spec(0.2), "b": spec(0.6, replicas="all"), "c": spec(0.2)}, "0") == {"0": ["a", "b", "c"]}


def test_large_engines_are_placed_first_on_the_device_with_the_most_room() -> None:
    engines = {"a": spec(0.2), "b": spec(0.3), "c": spec(0.6), "d": spec(0.5)}
    assert placed(engines, "0", "1") == {"0": ["a@0", "c@0"], "1": ["b@1", "d@1"]}


def test_replicas_of_an_engine_are_on_different_devices() -> None:
    engines = {"a": spec(0.4, replicas=2), "b": spec(0.4, replicas="all"), "c": spec(0.2)}
    assert placed(engines, "0", "1", "2") == {"0": ["a@0", "b@0"], "1": ["a@1", "b@1"], "2": ["b@2", "c@2"]}


def test_a_replica_has_the_specification_of_its_engine() -> None:
    engine = spec(0.4, replicas=2)
    assert place({"a": engine}, ["0", "2"]) == {"0": {"a@0": engine}, "2": {"a@2": engine}}


def test_an_engine_fits_only_devices_with_as_many_gpus_as_it_needs() -> None:
    pair, single = spec(0.5, replicas="all", vllm={"tensor_parallel_size": 2}), spec(0.5)
    sizes = {"0+1": 2, "2": 1, "3+4": 2}
    assert place({"a": single, "b": pair}, [*sizes], gpus=sizes) == {
        "0+1": {"b@0+1": pair},
        "2": {"a@2": single},
        "3+4": {"b@3+4": pair},
    }
    assert [*others({"a": single}, {"2": {}, "3+4": {}}, sizes)["3+4"]] == []
    with pytest.raises(ConfigError, match=r"engines\.b\.vllm\.tensor_parallel_size: no device has 2 GPUs; "):
        place({"b": pair}, ["0", "1"])


def test_more_replicas_than_devices_are_refused() -> None:
    message = r"engines\.a\.replicas: 3 replicas need as many devices, but there are 2 \(0, 1\); use fewer, or `all`"
    with pytest.raises(ConfigError, match=message):
        placed({"a": spec(0.1, replicas=3)}, "0", "1")


def test_engines_that_do_not_fit_are_refused_with_the_room_that_is_left() -> None:
    engines = {"a": spec(0.8), "b": spec(0.7), "c": spec(0.4)}
    with pytest.raises(ConfigError, match=r"engines\.c: no device has room .* left are 0\.2 of device 0, 0\.3 of dev"):
        placed(engines, "0", "1")
    assert place(engines, ["0", "1"], ["c"])["1"].keys() == {"b@1", "c@1"}
    with pytest.raises(ConfigError, match=r"engines\.b: no device has room"):
        place({"a": spec(0.7), "b": spec(0.7), "c": spec(0.4)}, ["0"], ["c"])
