"""Policies by name: built in, or a third party's by the entry-point group `troupe.policies`."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from agents import registry
from agents.role import Value, explain
from runtime.control.policy import Policy
from runtime.errors import ConfigError, PluginError

DEFAULT = "waterfill"


def make(name: str, options: Mapping[str, Any] | None = None, place: str = "control.policy") -> Policy:
    """The policy with its options. Raises ConfigError naming the key, PluginError for a third party's that cannot be
    used."""
    kind = _find(name, place)
    try:
        return kind(kind.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        known = ", ".join(["name", *kind.Options.model_fields])
        raise ConfigError(f"{place}.{explain(error)}; known keys are {known}") from None
    except Exception as error:  # a third party's policy may raise anything
        raise PluginError(f"{place}: policy {name} could not be made: {error!r}") from error


def is_shipped(policy: Policy) -> bool:
    """Whether it is one of Troupe's own, which need no watching over the time they take."""
    return type(policy).__module__.startswith("runtime.control.policies.")


def names() -> list[str]:
    """All that are registered."""
    return [entry.name for entry in registry.registered("policy")]


def _find(name: str, place: str) -> type[Policy]:
    try:
        entry = registry.find("policy", name)
        found = entry.load_subclass(Policy, "runtime.control.policy.Policy")  # type: ignore[type-abstract]  # the base itself
        options: object = found.Options
        if not (isinstance(options, type) and issubclass(options, Value)):
            raise entry.broken(f"{found.__name__}.Options has to be a subclass of agents.role.Value")
    except registry.UnknownName as error:
        raise ConfigError(f"{place}.name: {error}") from None
    except registry.BrokenPlugin as error:
        raise PluginError(f"{place}.name: {error}") from None
    return found
