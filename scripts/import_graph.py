"""Print the import graph of the packages, from the top layer down, with the packages that each one imports.

A package's layer is one above the highest layer that it imports, so every import points down. A cycle is an error.
`runtime/README.md` holds a copy, which tests/test_imports.py compares.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = ("agents", "runtime")


def sources(*folders: str) -> dict[str, str]:
    """Return the text of every Python file in the folders, by its path from the root."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def imported(source: str) -> Iterator[str]:
    """Yield the full names that a module imports, anywhere in it. `from a import b` yields a.b, module or not."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                above = "." * node.level + (node.module or "")
                yield from (f"{above}.{alias.name}" for alias in node.names)


def module_name(path: str) -> str:
    """Return the dotted name of a file's module."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def package_of(name: str) -> str:
    """Return `agents`, or what comes next below `runtime`: `runtime.jobs` for runtime.jobs.team.assemble."""
    return ".".join(name.split(".")[: 2 if name.startswith("runtime.") else 1])


def module_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the modules that each module imports, ours only."""
    modules = {module_name(path) for path in files}
    graph: dict[str, set[str]] = {}
    for path, source in files.items():
        names = {name for name in imported(source) if name.partition(".")[0] in OURS}
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module_name(path)] = (found & modules) - {module_name(path)}
    return graph


def package_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the packages that each package imports. A module right below `runtime` counts as a package."""
    graph: dict[str, set[str]] = {}
    for module, names in module_graph(files).items():
        package = package_of(module)
        graph.setdefault(package, set()).update(package_of(name) for name in names)
    return {package: names - {package} for package, names in graph.items() if package != "runtime"}


def layers(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the packages by layer, the lowest first. Raises graphlib.CycleError."""
    order = TopologicalSorter(graph).static_order()
    layer: dict[str, int] = {}
    for package in order:
        layer[package] = 1 + max((layer[name] for name in graph.get(package, ())), default=-1)
    return [sorted(name for name in layer if layer[name] == height) for height in range(max(layer.values()) + 1)]


def drawn() -> str:
    """Return the graph as text: a line for each package, the top layer first."""
    graph = package_graph(sources(*OURS))
    shown = {name: name.removeprefix("runtime.") for name in graph}
    width = max(map(len, shown.values()))
    lines = []
    for height, packages in reversed(list(enumerate(layers(graph)))):
        for package in packages:
            names = ", ".join(sorted(shown[name] for name in graph[package]))
            lines.append(f"{height:>2}  {shown[package]:<{width}}  {f'-> {names}' if names else ''}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(drawn())
    except CycleError as error:
        raise SystemExit(f"imports form a cycle: {' -> '.join(error.args[1])}") from None
