"""The shipped configurations load, and every error names the file, the key and what would be right."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from agents.role import Value
from runtime import config
from runtime.engines.spec import oversubscribe
from runtime.errors import ConfigError, TroupeError
from runtime.jobs.team import assemble


def shipped() -> list[str]:
    return sorted(path.stem for path in config.SHIPPED.glob("*.yaml"))


def write(folder: Path, text: str) -> str:
    path = folder / "team.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_load(name: str) -> None:
    loaded = config.load(name)
    team = assemble(loaded)
    critics = {"embedded-unchecked": set(), "embedded-serverless": {"checker", "reviewer", "examiner", "judge"}}
    assert set(team.seats) == {"planner", "solver"} | critics.get(name, {"critic"})
    assert oversubscribe(loaded.engines.values()) == (name == "embedded-serverless")


def test_extends_merges_key_by_key(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, "extends: embedded\nengines:\n  solver: {max_num_seqs: 7}\n"))
    assert loaded.engines["solver"].max_num_seqs == 7
    assert loaded.engines["solver"].model == config.load("embedded").engines["solver"].model
    assert Path(loaded.engines["solver"].model).is_absolute()


def test_relative_files_start_at_the_folder_of_the_configuration_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    write(
        tmp_path / "base",
        """
extends: embedded
service: {journal: jobs.db, tokens: ../tokens.json}
mqtt: {password_file: ~/password, ca_file: /etc/ca.pem}
tools: {search: {mcp: {url: "http://localhost:9", token_file: token}}}
""",
    )
    path = write(tmp_path, "extends: base/team.yaml\nservice: {journal: ./mine.db}\n")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    loaded = config.load(path)
    assert (loaded.service.journal, loaded.service.tokens) == (f"{tmp_path}/mine.db", f"{tmp_path}/base/../tokens.json")
    assert loaded.mqtt is not None
    assert (loaded.mqtt.password_file, loaded.mqtt.ca_file) == ("/home/me/password", "/etc/ca.pem")
    assert loaded.tools["search"].mcp is not None
    assert loaded.tools["search"].mcp.token_file == f"{tmp_path}/base/token"


def test_extends_keeps_workflow_options_unless_the_workflow_changes(tmp_path: Path) -> None:
    kept = config.load(write(tmp_path, "extends: embedded\nworkflow: {critics: []}\n"))
    assert kept.workflow.options == {"rounds": 3, "critics": []}
    other = config.load(write(tmp_path, "extends: embedded\nworkflow: {name: vote}\n"))
    assert other.workflow.options == {}


def test_configuration_is_frozen_and_survives_a_round_trip(tmp_path: Path) -> None:
    loaded = config.load("embedded")
    with pytest.raises(ValueError, match="frozen"):
        loaded.workflow = config.WorkflowChoice()
    again = config.load(write(tmp_path, config.as_yaml(loaded)))
    assert again.model_dump() == loaded.model_dump()


WRONG: list[tuple[str, list[str]]] = [
    ("", ["must hold a mapping"]),
    ("- a\n", ["must hold a mapping"]),
    ("engines: [\n", ["line 2"]),
    ("extends: embeded\n", ["embedded"]),
    ("extends: [1]\n", ["extends: give the name"]),
    ("extends: team.yaml\n", ["extends: the file extends itself"]),
    ("team: {}\n", ["engines: this key is required"]),
    ("extends: embedded\nengine: {}\n", ["engine: unknown key; did you mean engines?"]),
    ("extends: embedded\nengines: {solver: {modle: x}}\n", ["engines.solver.modle: unknown key; did you mean model?"]),
    ("extends: embedded\nsource: x\n", ["source: unknown key"]),
    ("extends: embedded\nservice: {journal: ~nobody-of-this-name/jobs.db}\n", ["journal: '~nobody", "name of no user"]),
    (f"extends: embedded\nday: {'9' * 5000}\n", ["4300 digits"]),
    ("extends: embedded\nengines: {solver: {vllm: {max_num_seqs: 5}}}\n", ["engines.solver.vllm", "a key beside vllm"]),
    ("extends: embedded\nengines: {solver: {vllm: {disable_log_stats: true}}}\n", ["set by Troupe"]),
    ("extends: embedded\nengines: {solver: {vllm: {kv_offloading_size: 4}}}\n", ["kv_offloading_size", "release"]),
    (
        "extends: embedded\nengines: {solver: {vllm: {kv_transfer_config: {kv_connector: NixlConnector}}}}\n",
        ["kv_transfer_config: vLLM would copy KV blocks", "remove it from vllm"],
    ),
    *(
        (
            f"extends: embedded\nengines: {{solver: {{vllm: {{kv_cache_dtype: {kind}_per_token_head}}}}}}\n",
            [f"kv_cache_dtype: {kind}_per_token_head: vLLM would write to all blocks", "use auto or fp8"],
        )
        for kind in ("int4", "int8", "fp8")
    ),
    ("extends: embedded\nengines: {solver: {vllm: {pipeline_parallel_size: 2}}}\n", ["tensor_parallel_size"]),
    ("extends: embedded\nengines: {solver: {vllm: {tensor_parallel_size: 0}}}\n", ["0 is not a number of GPUs"]),
    ("extends: embedded\nengines: {solver: {replicas: {mni: 1}}}\n", ["replicas.mni: unknown key; did you mean min"]),
    ("extends: embedded\ncluster: {adress: auto}\n", ["cluster.adress: unknown key; did you mean address?"]),
    ("extends: embedded-scarce\ncluster: {}\n", ["device.kv_cache_memory_bytes", "use device.memory_bytes instead"]),
    ("extends: embedded\ncluster: {nodes: 2}\n", ["cluster", "nodes_with: GPU"]),
    ("extends: embedded\ncluster: {address: local, nodes: 2, nodes_with: GPU}\n", ["a local cluster has one node"]),
    ("extends: embedded\ncluster: {lost_s: 0}\n", ["cluster.lost_s", "0.3"]),
    ("extends: embedded\ncluster: {namespace: a b}\n", ["cluster.namespace"]),
    ("extends: embedded\nengines: {solver: {max_num_seqs: many}}\n", ["engines.solver.max_num_seqs", "'many'"]),
    ("extends: embedded\nengines: {solver: {gpu_memory_utilization: 1.5}}\n", ["gpu_memory_utilization", "1.5"]),
    ("extends: embedded\nengines: {solver: {gpu_memory_utilization: 0.7}}\n", ["adds up to 1.3", "solver 0.7"]),
    ("extends: embedded\nengines: {solver: {gpu_memory_utilization: .nan}}\n", ["gpu_memory_utilization"]),
    ("extends: embedded\nengines: {solver: {kv_cache_memory_bytes: 64Mobs}}\n", ["kv_cache_memory_bytes", "64Mobs"]),
    ("extends: embedded\nengines: {solver: {model: ./nowhere}}\n", ["engines.solver.model", "nowhere does not exist"]),
    ("extends: embedded\nengines: {solver: {model: ./}}\n", ["engines.solver.model", "holds no config.json"]),
    ("extends: embedded\nteam: {solver: {role: arithmetic-solvr, engine: solver}}\n", ["arithmetic-solver"]),
    ("extends: embedded\nteam: {solver: {engine: sovler}}\n", ["team.solver.engine", "did you mean solver?"]),
    ("extends: embedded\nteam: {solver: {role: critic}}\n", ["team.solver.role", "SolveTask"]),
    ("extends: embedded\nteam: {solver: {role: ./role.yaml}}\n", ["role.yaml"]),
    ("extends: embedded\nteam: {solver: {temperature: 3}}\n", ["team.solver.temperature", "3"]),
    ("extends: embedded\nworkflow: {name: delibrate}\n", ["workflow.name", "deliberate"]),
    ("extends: embedded\nworkflow: {rounds: -1}\n", ["workflow.rounds", "greater than or equal to 0"]),
    ("extends: embedded\nworkflow: {round: 1}\n", ["workflow.round", "known keys are name, plans, critics"]),
    ("extends: embedded\nworkflow: {critics: [critic, checker]}\n", ["needs a 'checker'"]),
    ("extends: embedded\ncontrol: {evry_s: 1}\n", ["control.evry_s: unknown key; did you mean every_s?"]),
    ("extends: embedded\ncontrol: {every_s: 0}\n", ["control.every_s", "0.01"]),
    ("extends: embedded\ncontrol: {price_per_gpu_hour: -1}\n", ["control.price_per_gpu_hour"]),
    ("extends: embedded\nteam: {solver: {priority: 0}}\n", ["team.solver.priority", "1"]),
    ("extends: embedded\nteam: {solver: {minimum_share: 2}}\n", ["team.solver.minimum_share"]),
    ("extends: embedded\ndevice: {kv_cache_memory_bytes: 0}\n", ["device.kv_cache_memory_bytes"]),
    ("extends: embedded\nworkflow: {name: pipeline, seats: [solver]}\n", ["team.solver.role", "this seat WriteTask"]),
    ("extends: embedded\nworkflow: {name: pipeline, seats: [poet]}\n", ["needs a 'poet'; the team has planner"]),
    ("extends: embedded\nworkflow: {name: pipeline}\n", ["workflow.seats: field required"]),
    ("extends: embedded\nworkflow: {name: debate}\n", ["needs a 'judge'"]),
    ("extends: embedded\njudge: critic\n", ["judge: the role of the seat 'critic'", "CompareTask"]),
    ("extends: embedded\njudge: judge\n", ["judge: there is no seat 'judge'"]),
    ("extends: embedded\ntools: {x: {mcp: {comand: y}}}\n", ["tools.x.mcp.comand: unknown key; did you mean command?"]),
    ("extends: embedded\nteam: {solver: {tools: [python]}}\n", ["team.solver.tools", "add `tools: {python: {}}`"]),
    ("extends: embedded\ntools: {'a b': {}}\n", ["tools", "a b"]),
    ("extends: embedded\ntools: {x: {function: y}}\n", ["tools.x.function"]),
    ("extends: embedded\ntraces: {}\n", ["traces.endpoint: this key is required"]),
    ("extends: embedded\ntraces: {endpoint: localhost:4317}\n", ["traces.endpoint: 'localhost", "http://localhost:4317"]),
    ("extends: embedded\ntraces: {endpoint: 'http://x:none'}\n", ["traces.endpoint: 'http://x:none' is not a URL"]),
    ("extends: embedded\ntraces: {endpoint: 'http://x', protocol: http}\n", ["traces.protocol", "or 'http/protobuf'"]),
    ("extends: embedded\ntraces: {url: 'http://x'}\n", ["traces.url: unknown key", "endpoint"]),
    ("extends: embedded\ntools: {x: {mcp: {}}}\n", ["tools.x.mcp", "set exactly one of `command` and `url`"]),
]  # fmt: skip


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Value | config.Choice):
                yield from _sections(part)


@pytest.mark.parametrize("section", list(_sections(config.Config)), ids=lambda section: section.__name__)
def test_every_key_has_a_description(section: type[BaseModel]) -> None:
    assert [key for key, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(("text", "messages"), WRONG)
def test_errors_name_file_and_key(text: str, messages: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TroupeError) as error:
        assemble(config.load(path))
    for message in messages:
        assert message in str(error.value)
    assert path in str(error.value)


def test_unknown_configuration_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="embedded"):
        config.load("nowhere.yaml")


def test_role_defined_in_yaml_takes_a_seat(tmp_path: Path) -> None:
    role: dict[str, Any] = {
        "name": "units",
        "task": "critique",
        "prompt": "Is {result} a good result of {step}?",
        "reply": {"type": "object", "properties": {"accepted": {"type": "boolean"}}, "required": ["accepted"]},
    }
    (tmp_path / "units.yaml").write_text(yaml.safe_dump(role))
    loaded = config.load(
        write(
            tmp_path,
            "extends: embedded\nteam: {units: {role: ./units.yaml, engine: critic}}\n"
            "workflow: {critics: [critic, units]}\n",
        )
    )
    assert "units" in assemble(loaded).seats


SLEEPY = "extends: embedded\nresidency: {policy: {name: lru}}\n"


def test_engines_that_sleep_need_not_fit_together(tmp_path: Path) -> None:
    large = "engines: {planner: {gpu_memory_utilization: 0.9}}\n"
    with pytest.raises(
        ConfigError, match=r"stay awake adds up to 1\.5 .*unless a residency\.policy lets engines sleep"
    ):
        config.load(write(tmp_path, "extends: embedded\n" + large))
    loaded = config.load(write(tmp_path, SLEEPY + large))
    assert oversubscribe(loaded.engines.values())
    assert all(loaded.may_sleep(name) for name in loaded.engines)


def test_engines_that_never_sleep_must_fit_together(tmp_path: Path) -> None:
    never = "engines: {planner: {gpu_memory_utilization: 0.9, sleep: never}, solver: {sleep: never}}\n"
    with pytest.raises(ConfigError, match=r"stay awake adds up to 1\.2 \(planner 0\.9 \+ solver 0\.3\)"):
        config.load(write(tmp_path, SLEEPY + never))


def test_a_bound_of_all_kv_caches_and_engines_that_sleep_exclude_each_other(tmp_path: Path) -> None:
    bound = "device: {kv_cache_memory_bytes: 18MiB}\n"
    with pytest.raises(ConfigError, match=r"device\.kv_cache_memory_bytes: .* use device\.memory_bytes instead"):
        config.load(write(tmp_path, SLEEPY + bound))
    never = "engines: {planner: {sleep: never}, solver: {sleep: never}, critic: {sleep: never}}\n"
    config.load(write(tmp_path, SLEEPY + bound + never))


def test_an_engine_with_a_minimum_share_never_sleeps(tmp_path: Path) -> None:
    keeps = "team: {planner: {minimum_share: 0.1}, solver: {minimum_share: 0}}\n"
    loaded = config.load(write(tmp_path, SLEEPY + keeps))
    assert [name for name in loaded.engines if loaded.may_sleep(name)] == ["solver", "critic"]
    with pytest.raises(ConfigError, match=r"engines\.planner\.sleep: .*minimum_share \(team\.planner\) never sleeps"):
        config.load(write(tmp_path, SLEEPY + keeps + "engines: {planner: {sleep: auto}}\n"))


SECRET = """
extends: embedded
tools: {docs: {mcp: {command: docs, env: {TOKEN: hunter2}}}}
"""


def test_environment_of_a_server_is_never_shown(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, SECRET))
    assert "TOKEN" in config.as_yaml(loaded)
    assert "hunter2" not in config.as_yaml(loaded) + str(loaded.model_dump(mode="json")) + repr(loaded)
    with pytest.raises(ConfigError) as raised:
        config.load(write(tmp_path, SECRET.replace("hunter2", "12345678")))
    assert "tools.docs.mcp.env.TOKEN" in str(raised.value)
    assert "12345678" not in str(raised.value)
