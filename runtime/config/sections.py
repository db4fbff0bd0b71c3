"""The sections of a configuration, as frozen pydantic models.

scripts/reference.py writes the reference of all keys from their descriptions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from agents.names import nearest
from agents.role import Sampling, Value
from runtime.engines.spec import EngineSpec, ReplicaRange
from runtime.tools.mcp.settings import McpSettings


class Member(Value):
    """One seat of the team: its role, its engine, its sampling settings, and what it declares to the policies."""

    role: str = Field(
        min_length=1,
        description="Name of a registered role, or a YAML file that defines one. A relative path starts at the folder "
        "of the configuration.",
    )
    engine: str = Field(
        min_length=1, description="Name of the engine, a key of `engines`, that serves this seat. Seats can share one."
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Sampling temperature; 0 is greedy. The default is the role's own."
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Nucleus sampling: sample from the most likely tokens whose probabilities add up to this. The "
        "default is the role's own.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum length of one reply, in tokens. By default the role decides for each task.",
    )
    tools: tuple[str, ...] | None = Field(
        default=None,
        description="Names of the tools, keys of `tools`, that the seat's model may call. The default is the role's "
        "own.",
    )
    tool_calls_max: int = Field(
        default=8, ge=1, le=1000, description="The most tool calls of the seat's model for one reply."
    )
    priority: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Weight for the policies `turns`, `waterfill` and `paper`; 1 is the most urgent. An engine with "
        "several seats has the priority of the most urgent one.",
    )
    minimum_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the movable memory that the policies `turns` and `paper` set aside for this seat. By "
        "default `turns` sets nothing aside, and `paper` the same for all engines. An engine with several seats has "
        "the sum of theirs.",
    )
    jct_slo_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Objective for the duration of one job, in seconds. The policy `turns` serves an engine earlier "
        "while it keeps a job waiting that has already used a large part of this time.",
    )
    slo_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Objective for the duration of one call, in seconds. The policy `turns` serves an engine earlier "
        "while a request has waited for a large part of it.",
    )
    ttft_slo_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Objective for the time to the first token of one call, in seconds. The policy `turns` treats it "
        "like `slo_s`.",
    )
    tpot_slo_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Objective for the time between two tokens of one reply, in seconds. The policy `turns` limits the "
        "concurrency and the tokens of a step of all engines so that their steps take no longer.",
    )

    def sampling(self, defaults: Sampling) -> Sampling:
        """Return the role's defaults, replaced by what this member sets."""
        changes = {key: getattr(self, key) for key in ("temperature", "top_p", "max_tokens")}
        return defaults.model_copy(update={key: value for key, value in changes.items() if value is not None})


class Device(Value):
    """The device that the engines share, or each of several."""

    memory_bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Size of the device, of which `gpu_memory_utilization` is a share, for example `2GiB`. The default "
        "is the GPU's memory, or the machine's memory if there is no GPU.",
    )
    kv_cache_memory_bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Upper bound for the KV caches of all engines together, for example `18MiB`. By default only the "
        "size of the device bounds them.",
    )


class Choice(BaseModel):
    """A named workflow or policy. Every other key is an option, which the named workflow or policy validates."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(min_length=1)

    @property
    def options(self) -> Mapping[str, Any]:
        """Return every key but `name`."""
        return self.model_extra or {}


class WorkflowChoice(Choice):
    """The workflow that the team follows. Every key but `name` is an option of that workflow."""

    name: str = Field(
        default="deliberate",
        min_length=1,
        description="Name of a registered workflow. Built in are `deliberate`, `vote`, `debate`, `pipeline` and "
        "`solo`.",
    )


class PolicyChoice(Choice):
    """The policy that divides memory among the engines. Every key but `name` is an option of that policy."""

    name: str = Field(
        default="turns",
        min_length=1,
        description="Name of a registered policy. Built in are `turns`, `waterfill`, `static`, `round_robin`, "
        "`paper`, `modelclaim` and `on_demand`.",
    )


class Control(Value):
    """The controller, which moves memory between engines."""

    policy: PolicyChoice = Field(default=PolicyChoice(), description="The policy that decides each engine's grant.")
    shadow: PolicyChoice | None = Field(
        default=None,
        description="A second policy whose decisions are logged and never applied. By default there is none.",
    )
    every_s: float = Field(
        default=0.1,
        ge=0.01,
        le=3600,
        description="Interval between decisions, in seconds. The controller halves it while any engine is short of "
        "memory.",
    )
    grace_s: float = Field(
        default=0.5,
        ge=0,
        le=3600,
        description="Seconds for which running requests can keep memory that a decision takes from their engine. "
        "After that they are preempted.",
    )
    price_per_gpu_hour: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Price of a whole GPU for an hour, in any currency. `troupe bench` then reports the cost of a job.",
    )


class ResidencyChoice(Choice):
    """The policy that decides which engines are on the device. Every key but `name` is an option of that policy."""

    name: str = Field(
        default="keep",
        min_length=1,
        description="Name of a registered residency policy. Built in are `keep`, `job_graph`, `ttl`, `lru` and "
        "`histogram`. With `keep`, no engine sleeps.",
    )


class Tool(BaseModel):
    """A tool that models may call, or an MCP server with several. Every tool that is not here is off.

    Without `function` and `mcp`, the key is the name of a registered tool: `python`, or one that a package registers.
    Every other key is an option of that tool. Functions have `timeout_s` and `output_max_bytes`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    function: str | None = Field(
        default=None,
        pattern=r"^([\w.]+|.+\.py):\w+$",
        description="A Python function, as `module:function` or `file.py:function`. A relative file starts at the "
        "folder of the configuration.",
    )
    mcp: McpSettings | None = Field(
        default=None, description="An MCP server. Models know its tools as `<name>_<tool>`."
    )

    @property
    def options(self) -> Mapping[str, Any]:
        """Return every key but `function` and `mcp`."""
        return self.model_extra or {}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.function is not None and self.mcp is not None:
            raise ValueError("set either `function` or `mcp`")
        return self


class Residency(Value):
    """The rules by which engines sleep. An engine that sleeps gives its weights back until it is called."""

    policy: ResidencyChoice = Field(
        default=ResidencyChoice(), description="The policy that puts engines to sleep and wakes them."
    )
    host_memory_bytes: ByteSize | None = Field(
        default=None,
        ge=0,
        description="The most host memory for copies of the weights of engines that sleep on a GPU. An engine whose "
        "copy does not fit ends its process when it sleeps. The default is half of the machine's memory.",
    )


class Service(Value):
    """The address of `troupe serve`, the jobs that it accepts, and the time for which it keeps them."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Any address but localhost needs a token or `open: true`.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on. 0 takes a free port.")
    names: tuple[str, ...] = Field(
        default=(),
        description="Further host names that a service on localhost accepts in the `Host` header, for example behind a "
        "reverse proxy.",
    )
    open: bool = Field(
        default=False,
        description="Accept every request while no token exists. If false, a service that loses its last token while "
        "it runs refuses all requests.",
    )
    journal: str | None = Field(
        default=None,
        min_length=1,
        description="SQLite file that holds the jobs. A relative path starts at the folder of the configuration. The "
        "default is `jobs.db` in `$TROUPE_HOME`.",
    )
    tokens: str | None = Field(
        default=None,
        min_length=1,
        description="File that `troupe tokens` writes. A relative path starts at the folder of the configuration. The "
        "default is `tokens.json` in `$TROUPE_HOME`.",
    )
    jobs_at_once: int = Field(default=64, ge=1, le=100_000, description="Maximum number of running jobs.")
    queue_max: int = Field(
        default=10_000,
        ge=1,
        le=10_000_000,
        description="Maximum number of waiting jobs. The service refuses further submissions until there is room.",
    )
    keep_days: float = Field(
        default=30, ge=0, le=36_500, description="The time for which ended jobs stay in the journal, in days."
    )
    keep_jobs: int = Field(
        default=100_000, ge=0, description="Maximum number of ended jobs in the journal. The newest ones stay."
    )
    drain_s: float = Field(
        default=30,
        ge=0,
        le=86_400,
        description="Seconds that running jobs may take to end after SIGTERM. The next start resumes the rest.",
    )
    body_max_bytes: ByteSize = Field(
        default=ByteSize(1 << 20), gt=0, description="Maximum size of a request's body, for example `1MiB`."
    )
    requests_per_s: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Maximum rate of requests of one client, in requests a second. A client is a token, or an address "
        "without one. By default there is no limit.",
    )
    connections_max: int = Field(default=1000, ge=1, le=1_000_000, description="Maximum number of open connections.")


class Mqtt(Value):
    """The MQTT broker that the service connects to."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Host name or address of the broker.")
    port: int = Field(default=1883, ge=1, le=65535, description="TCP port of the broker.")
    cluster: str = Field(
        default="main",
        pattern="^[A-Za-z0-9_.-]{1,100}$",
        description="Name of this service in its topics, `troupe/<cluster>/...`: 1 to 100 letters, digits, `_`, `.` or "
        "`-`.",
    )
    username: str | None = Field(default=None, min_length=1, description="User name. By default none is sent.")
    password_file: str | None = Field(
        default=None,
        min_length=1,
        description="File whose first line is the password. A relative path starts at the folder of the configuration. "
        "By default none is sent.",
    )
    tls: bool = Field(default=False, description="Connect with TLS.")
    ca_file: str | None = Field(
        default=None,
        min_length=1,
        description="File of certificate authorities to trust; it turns TLS on. A relative path starts at the folder "
        "of the configuration. The default is the system's.",
    )


class Traces(Value):
    """The receiver of OpenTelemetry traces of jobs. The SDK's `OTEL_*` variables set everything else."""

    endpoint: str = Field(
        description="URL of an OTLP receiver, for example `http://localhost:4317`. With `http/protobuf`, a URL without "
        "a path gets `/v1/traces`."
    )
    protocol: Literal["grpc", "http/protobuf"] = Field(
        default="grpc", description="Protocol of the receiver. Port 4317 is usually `grpc`, and 4318 `http/protobuf`."
    )

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, endpoint: str) -> str:
        try:
            url = urlsplit(endpoint)
            is_url = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:  # the host or the port is malformed
            is_url = False
        if not is_url:
            raise ValueError(f"{endpoint!r} is not a URL with a host; give one such as http://localhost:4317")
        return endpoint


class Cluster(Value):
    """The Ray cluster whose nodes the team uses."""

    address: str = Field(
        default="auto",
        min_length=1,
        description="The Ray cluster: its HOST:PORT, `auto` for the one that this machine belongs to, or `local` to "
        "start one for this team on this machine, with an agent for each of `devices`.",
    )
    nodes_with: str | None = Field(
        default=None,
        min_length=1,
        description="Use only the nodes that have this resource of Ray, for example GPU. By default all are used.",
    )
    nodes: int | None = Field(
        default=None,
        ge=1,
        description="Ask the cluster's autoscaler for this many nodes that have `nodes_with`, and wait for them at the "
        "start, for at most ten minutes. By default the team uses the nodes that are there.",
    )
    namespace: str = Field(
        default="troupe",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="Ray's namespace. Teams that share a cluster need one each.",
    )
    lost_s: float = Field(
        default=1.0,
        ge=0.3,
        le=60,
        description="A node counts as lost after this many seconds of silence. Other replicas continue its replies.",
    )
    orphan_s: float = Field(
        default=300.0,
        ge=1,
        description="If the service dies without a shutdown, agents keep their engines for this many seconds. "
        "A service that starts meanwhile takes them over.",
    )
    open: bool = Field(
        default=False,
        description="Use a cluster that listens beyond localhost although it asks for no token. Whoever can reach it "
        "can run code on its nodes.",
    )

    @model_validator(mode="after")
    def _says_which_nodes(self) -> Self:
        if self.nodes is not None and self.address == "local":
            raise ValueError("nodes: a local cluster has one node, this machine; leave it out")
        if self.nodes is not None and self.nodes_with is None:
            raise ValueError("nodes: say which resource they have, for example nodes_with: GPU")
        return self


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Config(Value):
    """A whole configuration."""

    device: Device = Field(default=Device(), description="The device that the engines share, or each of several.")
    devices: Literal["all"] | tuple[int | tuple[int, ...], ...] = Field(
        default=(0,),
        description="The GPUs to use, by their CUDA index, or `all`. GPUs in brackets work as one device, for engines "
        "whose `vllm.tensor_parallel_size` is their number: `[[0, 1], 2]` has two devices. Without a GPU, "
        "each number stands for an emulated device of `device.memory_bytes`, and `all` for one device.",
    )
    engines: Mapping[str, EngineSpec] = Field(min_length=1, description="The engines, by name.")
    team: Mapping[str, Member] = Field(min_length=1, description="The seats of the team, by name.")
    cluster: Cluster | None = Field(
        default=None,
        description="The nodes that the engines run on. `devices` are those of each node. By default the engines run "
        "on this machine alone.",
    )
    workflow: WorkflowChoice = Field(default=WorkflowChoice(), description="The workflow that the team follows.")
    judge: str | None = Field(
        default=None,
        description="Seat that compares answers with expected ones, for problems with `compare: judge`. Its role must "
        "take `CompareTask`, as `judge` does. By default no seat does.",
    )
    tools: Mapping[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")], Tool] = Field(
        default={}, description="The tools that seats may use, by name: letters, digits, `_` and `-`."
    )
    control: Control = Field(default=Control(), description="The controller, which moves memory between engines.")
    residency: Residency = Field(default=Residency(), description="The rules by which engines sleep.")
    service: Service = Field(default=Service(), description="The address and the limits of `troupe serve`.")
    mqtt: Mqtt | None = Field(
        default=None, description="The MQTT broker that the service connects to. By default it connects to none."
    )
    traces: Traces | None = Field(
        default=None,
        description="The receiver of the OpenTelemetry traces of jobs that `troupe solve` and `troupe serve` export. "
        "By default there are no traces.",
    )
    _source: Path = PrivateAttr(default=Path())

    @property
    def source(self) -> Path:
        """Return the file that this configuration was read from."""
        return self._source

    @property
    def device_groups(self) -> list[tuple[int, ...]]:
        """The CUDA indices of each device in `devices`; empty for `all`."""
        devices = () if self.devices == "all" else self.devices
        return [(each,) if isinstance(each, int) else each for each in devices]

    @field_validator("devices", mode="before")
    @classmethod
    def _lists_devices(cls, value: object) -> object:
        given = value if isinstance(value, list | tuple) else []
        groups = [each if isinstance(each, list | tuple) else [each] for each in given]
        if value != "all" and not (groups and all(group and all(map(_is_index, group)) for group in groups)):
            raise ValueError("give `all`, a list of GPUs such as [0, 1], or one with groups such as [[0, 1], 2]")
        return value

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
                    f"engines.{name}.max_gpu_memory_utilization: {spec.max_gpu_memory_utilization:g} is below the "
                    f"engine's gpu_memory_utilization, {spec.gpu_memory_utilization:g}; give at least that"
                )
            if "@" in name:
                raise ValueError(f"engines.{name}: the name of an engine cannot contain @, which names its replicas")
        numbers = [number for group in self.device_groups for number in group]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"devices: a device is named twice in {numbers}; name each device once")
        self._check_kv_bound()
        self._check_sleep()
        self._check_shares()
        return self

    def _check_shares(self) -> None:
        """Check that the engines of one device fit it. The placement checks that of several."""
        if self.devices == "all" or len(self.devices) > 1 or self.cluster is not None:
            return
        awake = {name: spec for name, spec in self.engines.items() if not self.may_sleep(name)}
        shares = sum(spec.gpu_memory_utilization for spec in awake.values())
        if shares > 1 + 1e-9:
            parts = " + ".join(f"{name} {spec.gpu_memory_utilization:g}" for name, spec in awake.items())
            raise ValueError(
                f"engines: the gpu_memory_utilization of all engines that stay awake adds up to {shares:g} ({parts}); "
                "it can be at most 1, the whole device, unless a residency.policy lets engines sleep"
            )

    def _check_kv_bound(self) -> None:
        ranges = [name for name, spec in self.engines.items() if isinstance(spec.replicas, ReplicaRange)]
        if self.device.kv_cache_memory_bytes is not None and ranges:
            raise ValueError(
                f"device.kv_cache_memory_bytes: it cannot bound the KV caches of replicas that are added later "
                f"(engines.{ranges[0]}.replicas); use device.memory_bytes instead, or a fixed number of replicas"
            )
        if self.device.kv_cache_memory_bytes is not None and any(map(self.may_sleep, self.engines)):
            raise ValueError(
                "device.kv_cache_memory_bytes: it cannot bound the KV caches of engines that sleep; "
                "use device.memory_bytes instead, or the residency.policy keep"
            )
        if self.device.kv_cache_memory_bytes is not None and self.cluster is not None:
            raise ValueError(
                "device.kv_cache_memory_bytes: it cannot bound the KV caches of nodes that join a cluster later; "
                "use device.memory_bytes instead"
            )

    def _check_sleep(self) -> None:
        for name, spec in self.engines.items():
            seats = [seat for seat, member in self.team.items() if member.engine == name and member.minimum_share]
            if spec.sleep == "auto" and "sleep" in spec.model_fields_set and seats:
                raise ValueError(
                    f"engines.{name}.sleep: an engine with a minimum_share (team.{seats[0]}) never sleeps; "
                    "set the minimum_share to 0, or leave out sleep"
                )

    def may_sleep(self, engine: str) -> bool:
        """Return True if the residency policy may put the engine to sleep."""
        shares = (member.minimum_share for member in self.team.values() if member.engine == engine)
        return self.residency.policy.name != "keep" and self.engines[engine].sleep == "auto" and not any(shares)

    def with_workflow(self, name: str) -> "Config":
        """Return a copy that follows another workflow with its default options.

        Return the same configuration, options included, if it already follows that workflow.
        """
        return self if name == self.workflow.name else self.model_copy(update={"workflow": WorkflowChoice(name=name)})
