"""Finds, reads and merges the YAML files of a configuration, and checks the folders of its models."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from agents.names import nearest
from runtime.config.complaint import complaint
from runtime.config.sections import Config
from runtime.engines.spec import EngineSpec
from runtime.errors import ConfigError

DEFAULT = "embedded"
_RUNTIME = Path(__file__).parents[1]
SHIPPED = _RUNTIME / "_configs" if (_RUNTIME / "_configs").is_dir() else _RUNTIME.parent / "configs"
"""The folder of the shipped configurations: inside an installed wheel, or the repository's `configs`."""
_NAMES_OR_PATHS = (("engines", "*", "model"), ("team", "*", "role"), ("tools", "*", "function"))
"""Keys whose values are paths if they look like one; `*` stands for each key."""
_PATHS = (
    ("service", "journal"),
    ("service", "tokens"),
    ("mqtt", "password_file"),
    ("mqtt", "ca_file"),
    ("tools", "*", "mcp", "token_file"),
)
"""Keys whose values are paths."""


def load(name: str) -> Config:
    """Read and validate a configuration, given by its path or by the name of a shipped one.

    Raises ConfigError, which names the file, the key and what would be right.
    """
    path = find(name)
    layers = _layers(path, seen=())
    data: dict[str, Any] = {}
    for _, layer in reversed(layers):
        data = _merge(data, layer)
    try:
        config = Config.model_validate(data, context=path)
    except ValidationError as error:
        lines = (f"{_origin(layers, e['loc'])}: {complaint(dict(e), Config, ['extends'])}" for e in error.errors())
        raise ConfigError("\n".join(lines)) from None
    for engine, spec in config.engines.items():
        _check_model(path, engine, spec)
    return config


def find(name: str, folder: Path = SHIPPED, kind: str = "configuration") -> Path:
    """Return the path of a YAML file, given by its path or by the name of a shipped one in `folder`.

    `kind` is what such a file holds. Raises ConfigError if there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in shipped:
        return folder / f"{name}.yaml"
    raise ConfigError(f"there is no file and no shipped {kind} {name!r}; {nearest(name, shipped)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with text keys.

    Raises ConfigError, which names the file and, for a syntax error, the line.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the file is not UTF-8 text") from None
    except ValueError as error:  # a date or a number that PyYAML cannot represent
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {getattr(error, 'problem', None) or 'the file is not YAML'}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: the file must hold a mapping, one `key: value` a line")
    return data


def is_role_file(role: str) -> bool:
    """Return True if a member's role is a YAML file instead of a registered name."""
    return role.endswith((".yaml", ".yml"))


def as_yaml(section: BaseModel) -> str:
    """Return a configuration or a section as YAML, with every default written out."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the file's mapping, then that of the file which it extends, and so on, with absolute paths in each."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends: the file extends itself, through {', '.join(map(str, seen))}")
    data = read_yaml(path)
    _make_paths_absolute(data, path)
    base = data.pop("extends", None)
    if base is None:
        return [(path, data)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: give the name or the file of one configuration, not {base!r}")
    beside = path.parent / base
    try:
        extended = beside if beside.is_file() else find(base)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    return [(path, data), *_layers(extended, (*seen, path.resolve()))]


def _origin(layers: list[tuple[Path, dict[str, Any]]], location: tuple[int | str, ...]) -> Path:
    """Return the file that sets the key at a location.

    If no file sets it, return the one that has the most of its parent keys. The topmost file wins a tie.
    """

    def depth(data: Any) -> int:
        for level, key in enumerate(location):
            if not isinstance(data, dict) or key not in data:
                return level
            data = data[key]
        return len(location)

    return max(layers, key=lambda layer: depth(layer[1]))[0]


def _make_paths_absolute(data: dict[str, Any], file: Path) -> None:
    """Resolve relative paths against the folder of the file that names them, in place. Raises ConfigError."""
    folder = file.parent.resolve()
    for *sections, key in (*_NAMES_OR_PATHS, *_PATHS):
        for section in _sections(data, sections):
            value = section.get(key)
            if isinstance(value, str) and value and ((*sections, key) in _PATHS or _is_path(value)):
                try:
                    section[key] = str(folder / Path(value).expanduser())
                except RuntimeError:
                    raise ConfigError(f"{file}: {key}: {value!r} begins with the name of no user") from None


def _sections(data: Any, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the mappings below some keys; `*` stands for each key."""
    if isinstance(data, dict):
        match keys:
            case []:
                yield data
            case ["*", *rest]:
                for inner in data.values():
                    yield from _sections(inner, rest)
            case [first, *rest]:
                yield from _sections(data.get(first), rest)


def _is_path(value: str) -> bool:
    """Return True if the value of a key that may also be a name is a path."""
    return value.startswith(("./", "../", "~")) or is_role_file(value) or ".py:" in value


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `top` over it; merge mappings that both have."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _names_another_choice(key, old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _names_another_choice(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return True if `new` chooses another workflow or policy than `old`, whose options then do not apply."""
    return key in ("workflow", "policy", "shadow") and new.get("name", old.get("name")) != old.get("name")


def _check_model(path: Path, engine: str, spec: EngineSpec) -> None:
    """Raise ConfigError if the engine's model is a folder that holds no model.

    A model that is not written as a path is the name of a model on a hub. The hub says at the start if it is unknown.
    """
    if not spec.model.startswith("/"):
        return
    folder = Path(spec.model)
    needed = ["config.json"] if spec.load_format == "dummy" else ["config.json", "*.safetensors"]
    missing = [name for name in needed if not list(folder.glob(name))]
    if missing:
        state = f"holds no {' and no '.join(missing)}" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"{path}: engines.{engine}.model: the folder {folder} {state}; "
            "give the folder of a model, starting with ./ or /, or a hub's name such as Qwen/Qwen3-0.6B"
        )
