"""Finds and makes residency policies by name, through the entry-point group `troupe.residency`."""

from collections.abc import Mapping
from typing import Any

from runtime.control.catalogue import create
from runtime.residency.policy import ResidencyPolicy

PLACE = "residency.policy"


def make(name: str, options: Mapping[str, Any] | None = None, place: str = PLACE) -> ResidencyPolicy:
    """Return a residency policy with its options.

    Raises ConfigError if the name or an option is wrong, and PluginError if a third-party policy cannot be used. Errors
    name the key, below `place`.
    """
    policy = create("residency policy", ResidencyPolicy, name, options, place)  # type: ignore[type-abstract]  # the base
    policy.name = name
    return policy
