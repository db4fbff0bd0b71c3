"""A new role's package as text: what `troupe roles new` writes.

Owns the rules for a role's name and the templates beside this module. Nothing is written here; the caller does that.
"""

import re
from collections.abc import Collection, Mapping
from importlib.resources import files

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_NAME_MAX_CHARACTERS = 40
_NO_TEXT_IN_YAML = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})

_TEMPLATES: Mapping[str, str] = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "role.py.in": "@MODULE@.py",
    "test_role.py.in": "tests/test_@WORD@.py",
    "team.yaml.in": "team.yaml",
}


class NameRefused(ValueError):
    """A role cannot have this name; the message says what would be right."""


def distribution(name: str) -> str:
    """The name of the package that holds the role."""
    return f"troupe-role-{name}"


def package(name: str, taken: Collection[str]) -> dict[str, str]:
    """The files of a package with the role `name`: texts by path. `taken` are the names that other roles have.

    Raises NameRefused.
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
    """Why a new role cannot have this name; None when it can."""
    if not _NAME.fullmatch(name) or len(name) > _NAME_MAX_CHARACTERS:
        return (
            f"{name!r} cannot name a role: lowercase letters, digits and single hyphens, a letter first, "
            f"at most {_NAME_MAX_CHARACTERS} characters, such as second-opinion"
        )
    if name in _NO_TEXT_IN_YAML:
        return f"{name!r} cannot name a role: in a configuration, YAML reads it as no text; take another word"
    if name in taken:
        return f"there is a role {name!r} already; take another name"
    return None


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub("@([A-Z]+)@", lambda match: words[match[1]], text)
