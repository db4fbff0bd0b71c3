"""Everything Troupe raises for a user to read.

TroupeError
├── ConfigError      a configuration, role or workflow is wrong: file, key, what would be right   (exit code 2)
├── InputError       a problem or a line of a file is wrong                                       (exit code 2)
├── EngineError      an engine could not start, died, or refused a request
│   └── EngineDead   the engine's process is gone
└── PluginError      a third party's role or workflow cannot be used: which, and why               (exit code 2)
"""

__all__ = ["ConfigError", "EngineDead", "EngineError", "InputError", "PluginError", "TroupeError"]


class TroupeError(Exception):
    """Base of all errors meant for a user; the message stands on its own."""


class ConfigError(TroupeError):
    """A configuration is wrong. The message names the file, the key and what would be right."""


class InputError(TroupeError):
    """A problem, or a line of a file, is wrong. The message names the place and what would be right."""


class EngineError(TroupeError):
    """An engine could not start or serve. The message names the engine and where its log is."""


class EngineDead(EngineError):
    """The engine's process is gone."""


class PluginError(TroupeError):
    """A role or workflow of a third party cannot be used. The message names it and why."""
