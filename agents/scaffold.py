"""The package of a new role, as text, for `troupe roles new`.

This module has the rules for a role's name and fills the templates beside it. It writes no files; the caller does.
"""

import re
from collections.abc import Collection, Mapping
from importlib.resources import files

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_NAME_MAX_CHARACTERS = 40
_YAML_KEYWORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})

_TEMPLATES: Mapping[str, str] = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "role.py.in": "@MODULE@.py",
    "test_role.py.in": "tests/test_@WORD@.py",
    "team.yaml.in": "team.yaml",
}
"""The path of each template's result in the package."""


class NameRefused(ValueError):
    """A name that a new role cannot have. The message says what would be right."""


def distribution(name: str) -> str:
    """Return the name of the distribution that holds the role."""
    return f"troupe-role-{name}"


def package(name: str, taken: Collection[str]) -> dict[str, str]:
    """Return the files of a package with the role `name`: their texts by path. `taken` holds the names in use.

    Raise NameRefused if a role cannot have this name.
    """
    if fault := name_fault(name, taken):
        raise NameRefused(fault)
    word = name.replace("-", "_")
    words = {
        "NAME": name,
        "WORD": word,
        "DISTRIBUTION": distribution(name),
        "MODULE": distribution(name).replace("-", "_"),
        "CLASS": "".join(part.capitalize() for part in name.split("-")) + "Role",
    }
    folder = files("agents") / "templates" / "role"
    return {
        _filled(path, words): _filled((folder / template).read_text(encoding="utf-8"), words)
        for template, path in _TEMPLATES.items()
    }


def name_fault(name: str, taken: Collection[str]) -> str | None:
    """Return why a new role cannot have this name, or None if it can."""
    if not _NAME.fullmatch(name) or len(name) > _NAME_MAX_CHARACTERS:
        return (
            f"{name!r} cannot be a role's name: use lowercase letters, digits and single hyphens, start with a "
            f"letter, and use at most {_NAME_MAX_CHARACTERS} characters, as in second-opinion"
        )
    if name in _YAML_KEYWORDS:
        return f"{name!r} cannot be a role's name: in a configuration, YAML does not read it as text; use another name"
    if name in taken:
        return f"a role named {name!r} exists already; use another name"
    return None


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub("@([A-Z]+)@", lambda match: words[match[1]], text)
