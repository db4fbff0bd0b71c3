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
        ([0], (), {"0": None}),
        ([0], (3,), {"0": None}),
        ("all", (), {"0": None}),
        ("all", (3,), {"0": None}),
        ("all", (3, 5), {"0": 3, "1": 5}),
        ([1], (3, 5), {"1": 5}),
        ([1, 0], (3, 5), {"1": 5, "0": 3}),
        ([0, 1, 2], (), {"0": 0, "1": 1, "2": 2}),
    ],
)
def test_devices_are_numbered_as_cuda_sees_them(
    tmp_path: Path, devices: Any, gpus: tuple[int, ...], selected: dict[str, int | None]
) -> None:
    assert select(load(tmp_path, devices=devices), gpus) == selected


def test_a_gpu_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"team\.yaml: devices: there is no GPU 2; 2 are visible, .* use 0 to 1, or"):
        select(load(tmp_path, devices=[0, 2]), (0, 1))


def test_emulated_devices_need_a_size(tmp_path: Path) -> None:
    found = load(tmp_path, devices=[0, 1], device={"memory_bytes": None})
    with pytest.raises(ConfigError, match=r"device\.memory_bytes: without a GPU, several devices are emulated"):
        select(found, ())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"devices": [0, 0]}, r"devices: a device is named twice in \[0, 0\]"),
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
