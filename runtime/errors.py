"""The errors that Troupe raises for a user to read. A command that one of them ends has the exit code 2.

TroupeError
├── BudgetSpent      a job has used all the tokens that it was given
├── Busy             the job queue is full or the service is stopping; try again later
├── ConfigError      a configuration, role or workflow is wrong: file, key, what would be right
├── Forbidden        a token is missing, unknown, or lacks the required scope
├── InputError       a problem, a request, an option or a line of an input file is wrong
├── EngineError      an engine could not start, died, or refused a request
│   ├── EngineDead   the engine's process is gone
│   └── RequestRefused    an engine cannot serve a request, for example because its prompt is too long
│       └── RequestQuarantined    a request was alone in its engine when that ended; it is not sent again
├── JournalError     the job journal cannot be read or written
├── NotFound         no job, model or engine has that name
└── PluginError      a third party's role, workflow, policy or tool cannot be used: which, and why
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
    """The base of all errors for users. The message can be shown as it is."""


class BudgetSpent(TroupeError):
    """A job has used all the tokens that it was given."""


class Busy(TroupeError):
    """The service does not accept this request, or any request, at the moment. The message says why.

    `retry_s` is when the caller may try again, in seconds from now.
    """

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class ConfigError(TroupeError):
    """A configuration is wrong. The message names the file, the key and what would be right."""


class Forbidden(TroupeError):
    """A request is not allowed.

    `known` is False if its token is missing or unknown, and True if the token lacks the scope or the file of tokens
    cannot be read.
    """

    def __init__(self, message: str, known: bool) -> None:
        super().__init__(message)
        self.known = known


class InputError(TroupeError):
    """A problem, a request, an option or a line of a file is wrong. The message says where, and what would be right."""


class EngineError(TroupeError):
    """An engine could not start or serve. The message names the engine and its log file."""


class Death(StrEnum):
    """The end of an engine: an error of its own, a signal from outside (SIGKILL or SIGTERM), or no sign of life."""

    CRASHED = "crashed"
    KILLED = "was killed"
    HUNG = "hung"


class EngineDead(EngineError):
    """The engine's process is gone. `death` says how it ended."""

    def __init__(self, message: str, death: Death = Death.CRASHED) -> None:
        super().__init__(message)
        self.death = death


class RequestRefused(EngineError):
    """An engine cannot serve a request. The message says why."""


class RequestQuarantined(RequestRefused):
    """The engine ended while it had only this request, which is not sent again."""


class JournalError(TroupeError):
    """The job journal cannot be read or written. The message names the file and what to do."""


class NotFound(TroupeError):
    """No job, model or engine has the given name."""


class PluginError(TroupeError):
    """A third party's role, workflow, policy or tool cannot be used. The message names it and says why."""
