"""The devices of a configuration are found among the GPUs, or emulated."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime import config
from runtime.devices.selection import select
from runtime.errors import ConfigError

GIB = 1 << 30


def load(folder: Path, **keys: Any) -> config.Config:
    file = folder / "team.yaml"
    file.write_text(yaml.safe_dump({"extends": "embedded", "device": {"memory_bytes": 2 * GIB}, **keys}))
    return config.load(str(file))


@pytest.mark.parametrize(
    ("devices", "gpus", "selected"),
    [
        ([0], (), {"0": ()}),
        ([0], (3,), {"0": ()}),
        ("all", (), {"0": ()}),
        ("all", (3,), {"0": ()}),
        ("all", (3, 5), {"0": (3,), "1": (5,)}),
        ([1], (3, 5), {"1": (5,)}),
        ([1, 0], (3, 5), {"1": (5,), "0": (3,)}),
        ([0, 1, 2], (), {"0": (0,), "1": (1,), "2": (2,)}),
        ([[0, 2], 1], (3, 5, 7), {"0+2": (3, 7), "1": (5,)}),
        ([[0, 1]], (), {"0+1": (0, 1)}),
        ([[0]], (3,), {"0": ()}),
    ],
)
def test_devices_are_numbered_as_cuda_sees_them(
    tmp_path: Path, devices: Any, gpus: tuple[int, ...], selected: dict[str, tuple[int, ...]]
) -> None:
    assert select(load(tmp_path, devices=devices), gpus) == selected


def test_a_gpu_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"team\.yaml: devices: there is no GPU 2; 2 are visible, .* use 0 to 1, or"):
        select(load(tmp_path, devices=[0, 2]), (0, 1))


def test_all_gpus_are_grouped_by_what_each_engine_needs(tmp_path: Path) -> None:
    pairs = {name: {"vllm": {"tensor_parallel_size": 2}} for name in ("planner", "solver", "critic")}
    found = load(tmp_path, devices="all", engines=pairs)
    assert select(found, (0, 1, 2, 3, 4)) == {"0+1": (0, 1), "2+3": (2, 3)}
    with pytest.raises(ConfigError, match=r"devices: 1 GPUs are visible, and an engine needs 2"):
        select(found, (0,))
    found = load(tmp_path, devices="all", engines={"solver": pairs["solver"]})
    with pytest.raises(ConfigError, match=r"devices: the engines need 1 and 2 GPUs each .* name them, for"):
        select(found, (0, 1))


def test_emulated_devices_need_a_size(tmp_path: Path) -> None:
    found = load(tmp_path, devices=[0, 1], device={"memory_bytes": None})
    with pytest.raises(ConfigError, match=r"device\.memory_bytes: without a GPU, several devices are emulated"):
        select(found, ())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"devices": [0, 0]}, r"devices: a device is named twice in \[0, 0\]"),
        ({"devices": [[0, 1], 1]}, r"devices: a device is named twice in \[0, 1, 1\]"),
        ({"devices": [[]]}, r"devices: give `all`, a list of GPUs such as \[0, 1\], or one with groups"),
        ({"devices": []}, "devices"),
        ({"devices": [-1]}, "devices"),
        ({"devices": "some"}, "devices"),
        ({"engines": {"a@1": {"model": "m"}}}, r"engines\.a@1: the name of an engine cannot contain @"),
        ({"engines": {"solver": {"replicas": 0}}}, r"engines\.solver\.replicas"),
    ],
)
def test_wrong_devices_are_refused_by_their_key(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **keys)
