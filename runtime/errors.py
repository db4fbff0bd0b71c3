"""Everything Troupe raises for a user to read.

TroupeError
├── BudgetSpent      a job has used up the tokens that it was given
├── Busy             the queue of jobs is full, or the service is ending: the same may be asked later
├── ConfigError      a configuration, role or workflow is wrong: file, key, what would be right   (exit code 2)
├── Forbidden        a token is missing, unknown, or may not do this
├── InputError       a problem or a line of a file is wrong                                       (exit code 2)
├── EngineError      an engine could not start, died, or refused a request
│   ├── EngineDead   the engine's process is gone
│   └── RequestRefused    an engine cannot take a request: a prompt beyond its length, say
│       └── RequestQuarantined    a request is the likeliest cause of its engine's end, and is not sent again
├── JournalError     the store of jobs cannot be read or written
├── NotFound         there is no job, model or engine of that name
└── PluginError      a third party's role or workflow cannot be used: which, and why               (exit code 2)
"""

from enum import StrEnum

__all__ = [
    "BudgetSpent",
    "Busy",
    "ConfigError",
    "Death",
    "EngineDead",
    "EngineError",
    "Forbidden",
    "InputError",
    "JournalError",
    "NotFound",
    "PluginError",
    "RequestQuarantined",
    "RequestRefused",
    "TroupeError",
]


class TroupeError(Exception):
    """Base of all errors meant for a user; the message stands on its own."""


class BudgetSpent(TroupeError):
    """A job has used up the tokens that it was given."""


class Busy(TroupeError):
    """Nothing more is accepted now. The message says why, and that the same may be tried later."""


class ConfigError(TroupeError):
    """A configuration is wrong. The message names the file, the key and what would be right."""


class Forbidden(TroupeError):
    """A request may not do this: its token is missing or unknown, or, if `known`, no token is what it lacks."""

    def __init__(self, message: str, known: bool) -> None:
        super().__init__(message)
        self.known = known


class InputError(TroupeError):
    """A problem, or a line of a file, is wrong. The message names the place and what would be right."""


class EngineError(TroupeError):
    """An engine could not start or serve. The message names the engine and where its log is."""


class Death(StrEnum):
    """How an engine ended: by itself, by a signal from outside (SIGKILL, SIGTERM), or because it no longer answered."""

    CRASHED = "crashed"
    KILLED = "was killed"
    HUNG = "hung"


class EngineDead(EngineError):
    """The engine's process is gone; `death` says how it ended."""

    def __init__(self, message: str, death: Death = Death.CRASHED) -> None:
        super().__init__(message)
        self.death = death


class RequestRefused(EngineError):
    """An engine cannot take a request. The message says why."""


class RequestQuarantined(RequestRefused):
    """The engine ended, and this request is the likeliest cause. It is not sent again."""


class JournalError(TroupeError):
    """The store of jobs cannot be read or written. The message names the file and what can be done."""


class NotFound(TroupeError):
    """There is no such thing."""


class PluginError(TroupeError):
    """A role or workflow of a third party cannot be used. The message names it and why."""
