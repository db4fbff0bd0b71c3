"""Finds the devices that a configuration names."""

from collections.abc import Sequence

from runtime.config import Config
from runtime.errors import ConfigError


def select(config: Config, gpus: Sequence[int]) -> dict[str, int | None]:
    """Return the devices to use by name, each with its number: that of the GPU, or of an emulated device.

    `gpus` are the visible GPUs as NVML counts them, none on a machine without one. The number is None if there is
    nothing to choose. Raises ConfigError if a GPU does not exist, or if emulated devices have no size.
    """
    wanted = config.devices
    if wanted == (0,) or (wanted == "all" and len(gpus) < 2):
        return {"0": None}
    if not gpus:
        if config.device.memory_bytes is None:
            raise ConfigError(
                f"{config.source}: device.memory_bytes: without a GPU, several devices are emulated, and each needs a "
                "size, for example 2GiB"
            )
        return {str(number): number for number in wanted if isinstance(number, int)}
    numbers = range(len(gpus)) if wanted == "all" else wanted
    for number in numbers:
        if number >= len(gpus):
            raise ConfigError(
                f"{config.source}: devices: there is no GPU {number}; {len(gpus)} are visible, counted from 0, so use "
                f"0 to {len(gpus) - 1}, or `all`"
            )
    return {str(number): gpus[number] for number in numbers}
