"""The registry of roles, workflows and policies, which installed distributions register as entry points.

Troupe registers its own in pyproject.toml, in the same entry-point groups as any plug-in. A class is imported only when
it is requested, so a broken plug-in affects only teams that use it. The registry refuses a name that no distribution
registers, a name that two distributions register, and an entry point that leads to something of the wrong kind.

    RegistryError
    ├── UnknownName     the name is not registered; the message lists similar names and all names
    └── BrokenPlugin    the name is registered, but its class cannot be used; the message says by whom and why
"""

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Literal, TypeVar

from agents.check_role import class_faults, described, task_faults
from agents.names import nearest
from agents.role import Role, Task, Value
from agents.workflow import Workflow

Kind = Literal["role", "task", "workflow", "tool", "policy", "residency policy"]
GROUPS: dict[Kind, str] = {
    "role": "troupe.roles",
    "task": "troupe.tasks",
    "workflow": "troupe.workflows",
    "tool": "troupe.tools",
    "policy": "troupe.policies",
    "residency policy": "troupe.residency",
}
TROUPE = "troupe-llm"
T = TypeVar("T")


class RegistryError(ValueError):
    """A name that does not lead to a usable class. The message can be shown to users as it is."""


class UnknownName(RegistryError):
    """A name that no distribution registers."""


class BrokenPlugin(RegistryError):
    """A registered class that cannot be used. `why` is the reason, without the name."""

    def __init__(self, which: str, why: str) -> None:
        super().__init__(f"{which} cannot be used: {why}")
        self.why = why


@dataclass(frozen=True)
class Registered:
    """An entry point. `origin` is its distribution and version; `target` is its class as "module:Class"."""

    name: str
    kind: Kind
    origin: str
    target: str

    def load(self) -> type[Role] | type[Workflow]:
        """Import the role or workflow class. Raise BrokenPlugin if it cannot be used."""
        return self.load_role() if self.kind == "role" else self.load_workflow()

    def load_role(self) -> type[Role]:
        """Import the role class and create one role to test it. Raise BrokenPlugin if that fails."""
        role_class = self.load_subclass(Role, "agents.Role")  # type: ignore[type-abstract]  # the base itself
        if faults := class_faults(role_class):
            raise self.broken("; ".join(faults))
        try:
            role_class()
        except Exception as error:  # a plug-in may raise anything
            why = f"{role_class.__name__}() raised {described(error)}; its constructor must need no arguments"
            raise self.broken(why) from error
        return role_class

    def load_task(self) -> type[Task]:
        """Import the class of a kind of task. Raise BrokenPlugin if it is incomplete."""
        task = self.load_subclass(Task, "agents.Task")
        if faults := task_faults(task):
            raise self.broken("; ".join(faults))
        if ":" not in self.name and task.kind != self.name:
            raise self.broken(f"{task.__name__}.kind is {task.kind!r}: it must be the registered name, {self.name!r}")
        return task

    def load_workflow(self) -> type[Workflow]:
        """Import the workflow class. Raise BrokenPlugin if it is not a complete workflow."""
        workflow = self.load_subclass(Workflow, "agents.Workflow")  # type: ignore[type-abstract]  # as above
        options: object = workflow.Options
        if not (isinstance(options, type) and issubclass(options, Value)):
            raise self.broken(f"{workflow.__name__}.Options must be a subclass of agents.Value")
        return workflow

    def load_object(self) -> object:
        """Import whatever the entry point names. Raise BrokenPlugin if that fails."""
        return self._import()

    def load_subclass(self, base: type[T], place: str) -> type[T]:
        """Import the class. Raise BrokenPlugin unless it is a concrete subclass of `base`; errors call that `place`."""
        loaded = self._import()
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            what = (
                f"class {loaded.__name__}" if isinstance(loaded, type) else f"an object of type {type(loaded).__name__}"
            )
            raise self.broken(f"{what} is not a {self.kind}: it must be a subclass of {place}")
        if abstract := sorted(getattr(loaded, "__abstractmethods__", ())):
            raise self.broken(f"{loaded.__name__} lacks {', '.join(f'{name}()' for name in abstract)} of {place}")
        return loaded

    def _import(self) -> object:
        point = EntryPoint(self.name, self.target, GROUPS[self.kind])
        if not point.pattern.match(point.value):
            raise self.broken(f"the entry point {self.target!r} must have the form module:Class")
        try:
            return point.load()
        except (Exception, SystemExit) as error:  # importing a plug-in may raise anything
            raise self.broken(f"importing {self.target} raised {described(error)}") from error

    def broken(self, why: str) -> BrokenPlugin:
        """Return the error that says why this class cannot be used."""
        return BrokenPlugin(f"{self.kind} {self.name!r} of {self.origin}", why)


def registered(kind: Kind) -> list[Registered]:
    """Return the entries of a kind, sorted by name. A name that two distributions register occurs twice."""
    entries: list[Registered] = []
    seen: set[str] = set()
    for distribution in distributions():
        points = [point for point in _points(distribution) or () if point.group == GROUPS[kind]]
        if points and (key := _key(distribution)) not in seen:
            seen.add(key)  # Python imports the first copy of a distribution on sys.path
            entries += [Registered(point.name, kind, _origin(distribution), point.value) for point in points]
    return sorted(entries, key=lambda entry: (entry.name, entry.origin))


def unreadable() -> list[str]:
    """Return the distributions whose entry points cannot be read, so that what they register is unknown."""
    return sorted(_origin(distribution) for distribution in distributions() if _points(distribution) is None)


def find_role(name: str) -> type[Role]:
    """Return the role class of that name. Raise UnknownName or BrokenPlugin."""
    return find("role", name).load_role()


def find_task(name: str) -> type[Task]:
    """Return a kind of task, by its registered name or as module:Class. Raise UnknownName or BrokenPlugin."""
    if ":" in name:
        return Registered(name, "task", "this file", name).load_task()
    return find("task", name).load_task()


def find_workflow(name: str) -> type[Workflow]:
    """Return the workflow class of that name. Raise UnknownName or BrokenPlugin."""
    return find("workflow", name).load_workflow()


def find(kind: Kind, name: str) -> Registered:
    """Return the entry of that name without importing its class. Raise UnknownName or BrokenPlugin."""
    entries = registered(kind)
    match [entry for entry in entries if entry.name == name]:
        case [entry]:
            return entry
        case []:
            raise UnknownName(_unknown(kind, name, entries))
        case several:
            owners = " and ".join(f"{entry.origin} ({entry.target})" for entry in several)
            raise BrokenPlugin(f"{kind} {name!r}", f"it is registered by {owners}; uninstall all but one of them")


def _unknown(kind: Kind, name: str, entries: list[Registered]) -> str:
    message = f"no {kind} is named {name!r}; {nearest(name, (entry.name for entry in entries))}"
    if not any(entry.origin.startswith(f"{TROUPE} ") for entry in entries):
        message += ". The built-in ones are missing because Troupe is not installed: run `pip install -e .`"
    if origins := unreadable():
        message += f". The entry points of {', '.join(origins)} cannot be read"
    return message


def _points(distribution: Distribution) -> list[EntryPoint] | None:
    try:
        return list(distribution.entry_points)
    except Exception:  # noqa: BLE001  a malformed file can make the parser raise anything; see unreadable()
        return None


def _key(distribution: Distribution) -> str:
    """Return the distribution's name, normalized as PEP 503 says."""
    return re.sub(r"[-_.]+", "-", str(distribution.metadata["Name"])).lower()


def _origin(distribution: Distribution) -> str:
    return f"{distribution.metadata['Name']} {distribution.version}"
