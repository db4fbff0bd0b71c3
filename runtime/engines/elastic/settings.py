"""Holds the settings that Troupe gives an engine's processes beside vLLM's configuration."""

from dataclasses import dataclass
from pathlib import Path

from runtime.engines.step_time import StepTime


@dataclass(frozen=True)
class Settings:
    """The attribute `troupe_settings` of an engine's VllmConfig. See VllmEngine for the meaning of the fields.

    They are not in vLLM's `additional_config`, because vLLM makes that part of the key under which it keeps compiled
    models. Paths differ in each run, so each run would compile every model again.
    """

    name: str
    device: int
    log: Path
    temporary: Path
    ceiling_share: float
    device_bytes: int | None
    granule_bytes: int
    sleep_keeps_kv: bool
    step_time: StepTime | None
