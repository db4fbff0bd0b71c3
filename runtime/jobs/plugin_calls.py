"""Calls the code of roles and workflows, which a third party may have written."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from agents.role import ReplyUnusable, TaskRefused
from runtime.errors import PluginError

P = ParamSpec("P")
T = TypeVar("T")


def call_plugin(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a role or a workflow. Raise its errors as PluginError."""
    try:
        return function(*args, **kwargs)
    except (TaskRefused, ReplyUnusable):
        raise
    except Exception as error:
        raise PluginError(f"{what} raised {error!r}") from error
