"""Calls the code of roles and workflows. A third party may have written it."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from agents.role import ReplyUnusable, TaskRefused
from runtime.errors import PluginError

P = ParamSpec("P")
T = TypeVar("T")


def call_plugin(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a role or a workflow.

    Raise its errors as PluginError. TaskRefused and ReplyUnusable are part of the contract, and stay as they are.
    """
    try:
        return function(*args, **kwargs)
    except (TaskRefused, ReplyUnusable):
        raise
    except Exception as error:
        raise PluginError(f"{what} raised {error!r}") from error
