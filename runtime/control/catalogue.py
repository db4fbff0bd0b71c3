"""Finds and makes policies by name, built-in or third-party, through the entry-point group `troupe.policies`."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from agents import registry
from agents.role import Value, explain
from runtime.control.policy import Configurable, Policy
from runtime.errors import ConfigError, PluginError

DEFAULT = "turns"


T = TypeVar("T", bound=Configurable)


def make(name: str, options: Mapping[str, Any] | None = None, place: str = "control.policy") -> Policy:
    """Return a policy with its options.

    Raises ConfigError if the name or an option is wrong, and PluginError if a third-party policy cannot be used. Errors
    name the key, below `place`.
    """
    return create("policy", Policy, name, options, place)  # type: ignore[type-abstract]  # the base itself


def create(kind: registry.Kind, base: type[T], name: str, options: Mapping[str, Any] | None, place: str) -> T:
    """Return an object of a registered subclass of `base`, with its options. Raises what `make` raises."""
    policy_class = _find(kind, base, name, place)
    try:
        return policy_class(policy_class.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        known = ", ".join(["name", *policy_class.Options.model_fields])
        raise ConfigError(f"{place}.{explain(error, 'options')}; known keys are {known}") from None
    except Exception as error:  # a third-party policy may raise anything
        raise PluginError(f"{place}: {kind} {name!r} cannot be created: its constructor raised {error!r}") from error


def is_shipped(policy: Policy) -> bool:
    """Return True for a built-in policy, which needs no time limit."""
    return type(policy).__module__.startswith("runtime.control.policies.")


def names() -> list[str]:
    """Return the names of all registered policies."""
    return [entry.name for entry in registry.registered("policy")]


def _find(kind: registry.Kind, base: type[T], name: str, place: str) -> type[T]:
    try:
        entry = registry.find(kind, name)
        policy_class = entry.load_subclass(base, f"{base.__module__}.{base.__name__}")
        options: object = policy_class.Options
        if not (isinstance(options, type) and issubclass(options, Value)):
            raise entry.broken(f"{policy_class.__name__}.Options must be a subclass of agents.role.Value")
    except registry.UnknownName as error:
        raise ConfigError(f"{place}.name: {error}") from None
    except registry.BrokenPlugin as error:
        raise PluginError(f"{place}.name: {error}") from None
    return policy_class
