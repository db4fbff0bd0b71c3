"""Roles, workflows and policies by name: what is registered, by which distribution, and the class behind it.

The built-ins are registered in Troupe's own pyproject.toml, through the entry-point groups that a third party uses.
Nothing is imported before it is asked for, so a broken plug-in costs nobody who does not use it anything. Refuses a
name that is not registered, one that two distributions registered, and an entry point that is not of its kind.

    RegistryError
    ├── UnknownName     nothing of that name is registered: the nearest names, and all of them
    └── BrokenPlugin    it is registered, and cannot be used: by whom, and why
"""

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Literal, TypeVar

from agents.check_role import described, form_faults
from agents.names import nearest
from agents.role import Role, Value
from agents.workflow import Workflow

Kind = Literal["role", "workflow", "policy"]
GROUPS: dict[Kind, str] = {"role": "troupe.roles", "workflow": "troupe.workflows", "policy": "troupe.policies"}
TROUPE = "troupe-llm"
T = TypeVar("T")


class RegistryError(ValueError):
    """A name does not lead to what it should; the message stands on its own."""


class UnknownName(RegistryError):
    """Nothing of that name is registered."""


class BrokenPlugin(RegistryError):
    """What is registered under the name cannot be used; `why` is the reason without the name."""

    def __init__(self, which: str, why: str) -> None:
        super().__init__(f"{which} cannot be used: {why}")
        self.why = why


@dataclass(frozen=True)
class Registered:
    """One entry point. `origin` is its distribution and version, `target` the class as "module:Class"."""

    name: str
    kind: Kind
    origin: str
    target: str

    def load(self) -> type[Role] | type[Workflow]:
        """Import the class. Raises BrokenPlugin."""
        return self.load_role() if self.kind == "role" else self.load_workflow()

    def load_role(self) -> type[Role]:
        """Import the class and see that it is a role that can be made. Raises BrokenPlugin."""
        found = self.load_subclass(Role, "agents.role.Role")  # type: ignore[type-abstract]  # the base itself
        if faults := form_faults(found):
            raise self.broken("; ".join(faults))
        try:
            found()
        except Exception as error:  # a third party's code may raise anything
            why = f"{found.__name__}() raised {described(error)}; a role is made without arguments"
            raise self.broken(why) from error
        return found

    def load_workflow(self) -> type[Workflow]:
        """Import the class and see that it is a whole workflow. Raises BrokenPlugin."""
        found = self.load_subclass(Workflow, "agents.workflow.Workflow")  # type: ignore[type-abstract]  # as above
        options: object = found.Options
        if not (isinstance(options, type) and issubclass(options, Value)):
            raise self.broken(f"{found.__name__}.Options has to be a subclass of agents.role.Value")
        return found

    def load_subclass(self, base: type[T], place: str) -> type[T]:
        """Import the class and see that it is a whole one of its kind. Raises BrokenPlugin."""
        found = self._import()
        if not (isinstance(found, type) and issubclass(found, base)):
            raise self.broken(f"{_what(found)} is no {self.kind}: it has to be a subclass of {place}")
        if missing := _abstract(found):
            raise self.broken(f"{found.__name__} lacks {missing}() of {place}")
        return found

    def _import(self) -> object:
        point = EntryPoint(self.name, self.target, GROUPS[self.kind])
        if not point.pattern.match(point.value):
            raise self.broken(f"{self.target!r} is not written as module:Class")
        try:
            return point.load()
        except (Exception, SystemExit) as error:  # a third party's module may raise anything on import
            raise self.broken(f"importing {self.target} raised {described(error)}") from error

    def broken(self, why: str) -> BrokenPlugin:
        """The error that says why it cannot be used."""
        return BrokenPlugin(f"{self.kind} {self.name!r} of {self.origin}", why)


def registered(kind: Kind) -> list[Registered]:
    """Everything registered of a kind, by name; one name comes twice where two distributions registered it."""
    found: list[Registered] = []
    seen: set[str] = set()
    for distribution in distributions():
        points = [point for point in _points(distribution) or () if point.group == GROUPS[kind]]
        if points and (key := _key(distribution)) not in seen:
            seen.add(key)  # the first of a name on the path is the one that Python imports
            found += [Registered(point.name, kind, _origin(distribution), point.value) for point in points]
    return sorted(found, key=lambda entry: (entry.name, entry.origin))


def unreadable() -> list[str]:
    """The installed distributions whose entry points cannot be read, so that nobody knows what they register."""
    return sorted(_origin(distribution) for distribution in distributions() if _points(distribution) is None)


def find_role(name: str) -> type[Role]:
    """The role of that name. Raises UnknownName or BrokenPlugin."""
    return find("role", name).load_role()


def find_workflow(name: str) -> type[Workflow]:
    """The workflow of that name. Raises UnknownName or BrokenPlugin."""
    return find("workflow", name).load_workflow()


def find(kind: Kind, name: str) -> Registered:
    """The one entry of that name, not yet imported. Raises UnknownName or BrokenPlugin."""
    entries = registered(kind)
    match [entry for entry in entries if entry.name == name]:
        case [entry]:
            return entry
        case []:
            raise UnknownName(_unknown(kind, name, entries))
        case several:
            owners = " and ".join(f"{entry.origin} ({entry.target})" for entry in several)
            raise BrokenPlugin(f"{kind} {name!r}", f"it is registered by {owners}; uninstall all but one")


def _unknown(kind: Kind, name: str, entries: list[Registered]) -> str:
    why = f"no {kind} is named {name!r}; {nearest(name, (entry.name for entry in entries))}"
    if not any(entry.origin.startswith(f"{TROUPE} ") for entry in entries):
        why += ". Those built in are missing because Troupe is not installed: run `pip install -e .`"
    if lost := unreadable():
        why += f". The entry points of {', '.join(lost)} cannot be read"
    return why


def _points(distribution: Distribution) -> list[EntryPoint] | None:
    try:
        return list(distribution.entry_points)
    except Exception:  # noqa: BLE001  whatever a third party's malformed file makes the parser raise; see unreadable()
        return None


def _key(distribution: Distribution) -> str:
    """The name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", str(distribution.metadata["Name"])).lower()


def _origin(distribution: Distribution) -> str:
    return f"{distribution.metadata['Name']} {distribution.version}"


def _abstract(found: type) -> str:
    return "(), ".join(sorted(getattr(found, "__abstractmethods__", ())))


def _what(found: object) -> str:
    return f"class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
