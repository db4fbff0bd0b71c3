"""The configuration: read once, held against everything it names, frozen after.

The only module that reads YAML. A configuration may build on another (`extends`), a mapping over a mapping key by
key. Errors name the file, the key and what would be right.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from agents.names import nearest
from agents.role import Sampling
from runtime.engines.spec import EngineSpec
from runtime.errors import ConfigError

DEFAULT = "embedded"
_HERE = Path(__file__).parent
SHIPPED = _HERE / "_configs" if (_HERE / "_configs").is_dir() else _HERE.parent / "configs"
"""The shipped configurations: inside an installed wheel, or the repository's."""


class Section(BaseModel):
    """A part of a configuration: frozen, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Member(Section):
    """One seat of the team: which role, on which engine, sampled how (over the role's own defaults).

    For the policies: `priority` 1 is the most urgent; `minimum_share` is of the memory that moves; `slo_s` is how long
    a call may take, in seconds.
    """

    role: str = Field(
        min_length=1, description="a registered role, or a YAML file of one relative to the configuration"
    )
    engine: str = Field(min_length=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    priority: int = Field(default=1, ge=1, le=100)
    minimum_share: float | None = Field(default=None, ge=0, le=1)
    slo_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def sampling(self, defaults: Sampling) -> Sampling:
        """The role's defaults with what this member sets."""
        changes = {key: getattr(self, key) for key in ("temperature", "top_p", "max_tokens")}
        return defaults.model_copy(update={key: value for key, value in changes.items() if value is not None})


class Device(Section):
    """What the engines share. `memory_bytes` is what counts as the whole of it: by default the GPU's memory, or the
    machine's where there is no GPU. `kv_cache_memory_bytes` bounds their KV caches together further."""

    memory_bytes: ByteSize | None = Field(default=None, gt=0)
    kv_cache_memory_bytes: ByteSize | None = Field(default=None, gt=0)


class Choice(BaseModel):
    """Something by name; every other key is one of its options, which what is named checks itself."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(min_length=1)

    @property
    def options(self) -> Mapping[str, Any]:
        """The keys beside the name."""
        return self.model_extra or {}


class WorkflowChoice(Choice):
    """How the team works."""

    name: str = Field(default="deliberate", min_length=1)


class PolicyChoice(Choice):
    """Who gets how much memory."""

    name: str = Field(default="waterfill", min_length=1)


class Control(Section):
    """How memory moves: by which policy, how often it decides (twice as often while memory is short), and how long
    requests may go on using memory that is to go (seconds). A `shadow` policy decides beside it, and is only logged.
    `price_per_gpu_hour` is what the whole device costs, in any currency."""

    policy: PolicyChoice = PolicyChoice()
    shadow: PolicyChoice | None = None
    every_s: float = Field(default=0.1, ge=0.01, le=3600)
    grace_s: float = Field(default=0.5, ge=0, le=3600)
    price_per_gpu_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class Service(Section):
    """How `troupe serve` is reached, and what it takes.

    Jobs are in `journal` (a file; by default under $TROUPE_HOME), `jobs_at_once` of them worked and at most
    `queue_max` waiting; those that ended are kept for `keep_days`, the newest `keep_jobs` of them. SIGTERM gives
    what runs `drain_s` seconds. `tokens` is the file that `troupe tokens` writes; without a token in it only
    localhost is listened on, unless `open` says that everybody who reaches the port may do everything. A service
    that loses its last token while it runs lets nobody in, unless it is `open`. Requests have bodies of at most
    `body_max_bytes`, and come at most `requests_per_s` times a second from one client (a token, or an address), over
    at most `connections_max` connections; `names` are further host names under which a service on localhost is
    asked.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    names: tuple[str, ...] = ()
    open: bool = False
    journal: str | None = Field(default=None, min_length=1)
    tokens: str | None = Field(default=None, min_length=1)
    jobs_at_once: int = Field(default=64, ge=1, le=100_000)
    queue_max: int = Field(default=10_000, ge=1, le=10_000_000)
    keep_days: float = Field(default=30, ge=0, le=36_500)
    keep_jobs: int = Field(default=100_000, ge=0)
    drain_s: float = Field(default=30, ge=0, le=86_400)
    body_max_bytes: ByteSize = Field(default=ByteSize(1 << 20), gt=0)
    requests_per_s: float | None = Field(default=None, gt=0, le=1e6)
    connections_max: int = Field(default=1000, ge=1, le=1_000_000)


class Mqtt(Section):
    """The broker that a service talks to, as `cluster` in its topics. The password is the first line of
    `password_file`. `tls` with the system's authorities, or those of `ca_file`."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=1883, ge=1, le=65535)
    cluster: str = Field(default="main", pattern="^[A-Za-z0-9_.-]{1,100}$")
    username: str | None = Field(default=None, min_length=1)
    password_file: str | None = Field(default=None, min_length=1)
    tls: bool = False
    ca_file: str | None = Field(default=None, min_length=1)


class Config(Section):
    """The device, the engines that share it, the team that they serve, how the team works, who gets how much, and how
    the service over them is reached: by HTTP, and by MQTT where there is a section for it."""

    device: Device = Device()
    engines: Mapping[str, EngineSpec] = Field(min_length=1)
    team: Mapping[str, Member] = Field(min_length=1)
    workflow: WorkflowChoice = WorkflowChoice()
    control: Control = Control()
    service: Service = Service()
    mqtt: Mqtt | None = None
    _source: Path = PrivateAttr(default=Path())

    @property
    def source(self) -> Path:
        """The file it came from."""
        return self._source

    @model_validator(mode="after")
    def _note_source(self, info: ValidationInfo) -> Self:
        self._source = info.context or self._source
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for seat, member in self.team.items():
            if member.engine not in self.engines:
                raise ValueError(
                    f"team.{seat}.engine: there is no engine {member.engine!r}; {nearest(member.engine, self.engines)}"
                )
        for name, spec in self.engines.items():
            if spec.max_gpu_memory_utilization < spec.gpu_memory_utilization:
                raise ValueError(
                    f"engines.{name}: max_gpu_memory_utilization {spec.max_gpu_memory_utilization:g} is below "
                    f"gpu_memory_utilization {spec.gpu_memory_utilization:g}, which it begins with"
                )
        shares = sum(spec.gpu_memory_utilization for spec in self.engines.values())
        if shares > 1 + 1e-9:
            parts = " + ".join(f"{name} {spec.gpu_memory_utilization:g}" for name, spec in self.engines.items())
            raise ValueError(
                f"engines: gpu_memory_utilization adds up to {shares:g} ({parts}); at most 1 fits a device"
            )
        return self

    def with_workflow(self, name: str) -> "Config":
        """The same with another workflow, at its defaults where the name is not the configured one."""
        return self if name == self.workflow.name else self.model_copy(update={"workflow": WorkflowChoice(name=name)})


def load(name: str) -> Config:
    """Read a configuration: a file, or the name of a shipped one.

    Raises ConfigError naming the file, the key and what would be right.
    """
    path = find(name)
    layers = _layers(path, seen=())
    data: dict[str, Any] = {}
    for _, layer in reversed(layers):
        data = _over(data, layer)
    try:
        config = Config.model_validate(data, context=path)
    except ValidationError as error:
        lines = (f"{_origin(layers, e['loc'])}: {_complaint(dict(e))}" for e in error.errors())
        raise ConfigError("\n".join(lines)) from None
    for engine, spec in config.engines.items():
        _check_model(path, engine, spec)
    return config


def find(name: str) -> Path:
    """The file of a configuration given by path or, for a shipped one, by name. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
    if name in shipped:
        return SHIPPED / f"{name}.yaml"
    raise ConfigError(f"there is no file {name!r}, and no shipped configuration of that name; {nearest(name, shipped)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError with the line of a fault."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except ValueError as error:  # a date or a number that yaml cannot make
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {getattr(error, 'problem', None) or 'not YAML'}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: not a mapping of keys to values")
    return data


def is_role_file(role: str) -> bool:
    """Whether a member's role is a YAML file and not a registered name."""
    return role.endswith((".yaml", ".yml"))


def as_yaml(section: BaseModel) -> str:
    """A configuration, or another section, as YAML, every default written out."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """The file's mapping, then the one it extends, and so on; model folders and role files made absolute."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(map(str, seen))}")
    data = read_yaml(path)
    _anchor(data, path.parent.resolve())
    base = data.pop("extends", None)
    if base is None:
        return [(path, data)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: give the name or the file of one configuration")
    beside = path.parent / base
    try:
        below = beside if beside.is_file() else find(base)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    return [(path, data), *_layers(below, (*seen, path.resolve()))]


def _origin(layers: list[tuple[Path, dict[str, Any]]], location: tuple[int | str, ...]) -> Path:
    """The file that says what is at a place: the topmost of those that go deepest."""

    def depth(data: Any) -> int:
        for level, key in enumerate(location):
            if not isinstance(data, dict) or key not in data:
                return level
            data = data[key]
        return len(location)

    return max(layers, key=lambda layer: depth(layer[1]))[0]


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Relative model folders and role files are relative to the file that names them."""
    for section, key in (("engines", "model"), ("team", "role")):
        entries = data.get(section)
        for entry in entries.values() if isinstance(entries, dict) else ():
            value = entry.get(key) if isinstance(entry, dict) else None
            if isinstance(value, str) and (value.startswith(("./", "../", "~")) or is_role_file(value)):
                entry[key] = str(folder / Path(value).expanduser())


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        deep = isinstance(old, dict) and isinstance(value, dict) and not _other_choice(key, old, value)
        merged[key] = _over(old or {}, value) if deep else value
    return merged


def _other_choice(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """One workflow's or policy's options are not another's: one of another name starts from its own defaults."""
    return key in ("workflow", "policy", "shadow") and new.get("name", old.get("name")) != old.get("name")


def _check_model(path: Path, engine: str, spec: EngineSpec) -> None:
    """A folder must hold a model; anything that is not written as a path is a hub's name, and the hub's to judge."""
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


def _complaint(error: dict[str, Any]) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"])
        return f"{place}: unknown key; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{place}: {message}" if place else message
    if error["type"] == "missing":
        return f"{place}: missing"
    return f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"device": Device, "engines": EngineSpec, "team": Member, "control": Control}
    parts |= {"service": Service, "mqtt": Mqtt}
    section = parts.get(str(location[0])) if len(location) > 1 else Config
    names = list((section or Config).model_fields)
    return [*names, *(["extends"] if section is Config else [])]
