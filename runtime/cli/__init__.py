"""The command `troupe`: one module for each subcommand; `main` puts them together.

The package refuses to be imported if another distribution's package `agents` hides Troupe's.
"""

from importlib.util import find_spec
from pathlib import Path

_OURS = Path(__file__).parents[2] / "agents" / "__init__.py"
_found = find_spec("agents")
if _found is None or _found.origin is None or not _OURS.samefile(_found.origin):
    raise ImportError(
        f"Python finds {_found and _found.origin} before Troupe's package `agents`. Another distribution, such as "
        "openai-agents, installs a package of the same name; install Troupe in a virtual environment without it"
    )
