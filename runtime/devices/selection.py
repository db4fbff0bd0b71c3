"""Finds the devices that a configuration names."""

from collections.abc import Mapping, Sequence
from itertools import chain

from runtime.config import Config
from runtime.engines.spec import EngineSpec
from runtime.errors import ConfigError


def select(
    config: Config, gpus: Sequence[int], specs: Mapping[str, EngineSpec] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the devices to use by name, each with the numbers of its GPUs, or of its emulated ones.

    A device is one GPU, or a group that works as one: `tensor_parallel_size` of its engines is the size of the group.
    `gpus` are the visible GPUs as NVML counts them, none on a machine without one. `specs` are the engines to run, by
    default all. A device has no numbers if there is nothing to choose. Raises ConfigError if a GPU does not exist, or
    if emulated devices have no size.
    """
    wanted = groups(config, len(gpus), specs)
    if wanted == [(0,)]:
        return {"0": ()}
    if not gpus:
        if config.device.memory_bytes is None:
            raise ConfigError(
                f"{config.source}: device.memory_bytes: without a GPU, several devices are emulated, and each needs a "
                "size, for example 2GiB"
            )
        return {name_of(group): group for group in wanted}
    for number in chain.from_iterable(wanted):
        if number >= len(gpus):
            raise ConfigError(
                f"{config.source}: devices: there is no GPU {number}; {len(gpus)} are visible, counted from 0, so use "
                f"0 to {len(gpus) - 1}, or `all`"
            )
    return {name_of(group): tuple(gpus[number] for number in group) for group in wanted}


def groups(config: Config, gpus: int, specs: Mapping[str, EngineSpec] | None = None) -> list[tuple[int, ...]]:
    """Return the CUDA indices of each device that the configuration names, on a machine with this many GPUs.

    `all` makes groups of as many GPUs as each engine needs. Raises ConfigError if engines need different numbers, or if
    the GPUs do not suffice for one group.
    """
    if config.devices != "all":
        return config.device_groups
    size = group_size(config, specs or config.engines)
    if gpus < size and size > 1:
        raise ConfigError(
            f"{config.source}: devices: {gpus} GPUs are visible, and an engine needs {size} (tensor_parallel_size); "
            "without a GPU, name the emulated ones, for example [[0, 1]]"
        )
    return [tuple(range(first, first + size)) for first in range(0, max(gpus, 1) - size + 1, size)]


def group_size(config: Config, specs: Mapping[str, EngineSpec]) -> int:
    """Return how many GPUs each engine needs. Raises ConfigError if they need different numbers."""
    sizes = {spec.gpus for spec in specs.values()}
    if len(sizes) > 1:
        raise ConfigError(
            f"{config.source}: devices: the engines need {' and '.join(map(str, sorted(sizes)))} GPUs each "
            "(tensor_parallel_size), so `all` does not say which work together; name them, for example [[0, 1], 2]"
        )
    return max(sizes)


def sizes(devices: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return how many GPUs each device has, given what `select` returned."""
    return {name: max(len(numbers), 1) for name, numbers in devices.items()}


def name_of(group: tuple[int, ...]) -> str:
    """Return the name of a device: the CUDA indices of its GPUs, joined by plus signs."""
    return "+".join(map(str, group))
