"""The registry over distributions on the import path, laid out as pip does."""

import subprocess
import sys
from pathlib import Path

import pytest

import agents
from agents import registry
from agents.arithmetic.roles import ArithmeticCritic, ArithmeticPlanner, ArithmeticSolver
from agents.registry import BrokenPlugin, UnknownName, find_role, find_workflow, registered
from agents.roles.coder import Coder
from agents.roles.critic import Critic
from agents.roles.judge import Judge
from agents.roles.planner import Planner
from agents.roles.solver import Solver
from agents.roles.summarizer import Summarizer
from agents.workflows.debate import Debate
from agents.workflows.deliberate import Deliberate
from agents.workflows.pipeline import Pipeline
from agents.workflows.solo import Solo
from agents.workflows.vote import Vote
from tests.plugins import ECHO, lay_out

ROLES, WORKFLOWS = "troupe.roles", "troupe.workflows"


def test_built_in_roles_and_workflows_are_registered() -> None:
    assert {e.name: e.load() for e in registered("role") if e.origin.startswith("troupe-llm ")} == {
        "planner": Planner,
        "solver": Solver,
        "critic": Critic,
        "coder": Coder,
        "judge": Judge,
        "summarizer": Summarizer,
        "arithmetic-planner": ArithmeticPlanner,
        "arithmetic-solver": ArithmeticSolver,
        "arithmetic-critic": ArithmeticCritic,
    }
    assert {e.name: e.load() for e in registered("workflow") if e.origin.startswith("troupe-llm ")} == {
        "deliberate": Deliberate,
        "vote": Vote,
        "debate": Debate,
        "pipeline": Pipeline,
        "solo": Solo,
    }


def test_role_of_a_plugin_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lay_out(tmp_path, "echo-kit", {ROLES: {"echo": "echo_kit:Echo"}}, {"echo_kit": ECHO}))
    assert find_role("echo").__name__ == "Echo"
    [entry] = [e for e in registered("role") if e.name == "echo"]
    assert (entry.kind, entry.origin, entry.target) == ("role", "echo-kit 1.0", "echo_kit:Echo")


def test_unknown_name_error_lists_similar_and_all_names() -> None:
    with pytest.raises(
        UnknownName, match=r"no role is named 'solvr'; did you mean solver\?.*arithmetic-critic.*planner"
    ):
        find_role("solvr")
    with pytest.raises(
        UnknownName, match=r"no workflow is named 'voting'.*known: debate, deliberate, pipeline, solo, vote"
    ):
        find_workflow("voting")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise RuntimeError('no licence')", "importing {module}:Thing raised RuntimeError: no licence"),
        ("import sys; sys.exit(3)", "importing {module}:Thing raised SystemExit: 3"),
        ("def broken(:", "importing {module}:Thing raised SyntaxError"),
        ("import there_is_no_such_module", "No module named 'there_is_no_such_module'"),
        ("thing = 1", "has no attribute 'Thing'"),
        ("class Thing: pass", "class Thing is not a role: it must be a subclass of agents.Role"),
        ("Thing = 3", "an object of type int is not a role"),
        (ECHO + "Thing = Echo()", "an object of type Echo is not a role"),
        ("from agents.role import Role\nclass Thing(Role): pass", r"Thing lacks messages\(\), parse\(\)"),
        (ECHO + "class Thing(Echo):\n  def __init__(self, x): pass", "its constructor must need no arguments"),
        (ECHO + "class Thing(Echo): takes = AnswerTask", "takes is .*: it must be a tuple"),
        (ECHO + "class Thing(Echo): sampling = {'temperature': 1}", "sampling is .*: it must be"),
    ],
)
def test_broken_role_fails_only_when_it_is_used(
    source: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"broken_{abs(hash(source))}"
    entries = {ROLES: {"broken": f"{module}:Thing"}}
    monkeypatch.syspath_prepend(lay_out(tmp_path, "broken-kit", entries, {module: source}))
    assert "broken" in [e.name for e in registered("role")]
    assert find_role("solver") is Solver
    with pytest.raises(BrokenPlugin, match=why.format(module=module)) as raised:
        find_role("broken")
    assert "role 'broken' of broken-kit 1.0 cannot be used" in str(raised.value)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("class Thing: pass", "class Thing is not a workflow"),
        (
            "from agents.workflow import Workflow\nclass Thing(Workflow): pass",
            r"Thing lacks begin\(\), seats\(\), take\(\)",
        ),
        (
            "from agents import Solo\nclass Thing(Solo):\n  Options = dict",
            "Thing.Options must be a subclass",
        ),
    ],
)
def test_broken_workflow_fails_only_when_it_is_used(
    source: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"broken_{abs(hash(source))}"
    entries = {WORKFLOWS: {"broken": f"{module}:Thing"}}
    monkeypatch.syspath_prepend(lay_out(tmp_path, "broken-kit", entries, {module: source}))
    assert find_workflow("solo") is Solo
    with pytest.raises(BrokenPlugin, match=f"workflow 'broken' of broken-kit 1.0 cannot be used: {why}"):
        find_workflow("broken")


def test_name_of_two_distributions_is_refused_only_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kit in ("one-kit", "two-kit"):
        entries = {ROLES: {"shared": "shared_echo:Echo", f"{kit}-own": "shared_echo:Echo"}}
        monkeypatch.syspath_prepend(lay_out(tmp_path / kit, kit, entries, {"shared_echo": ECHO}))
    assert find_role("one-kit-own").__name__ == find_role("two-kit-own").__name__ == "Echo"
    with pytest.raises(
        BrokenPlugin, match=r"registered by one-kit 1.0 .* and two-kit 1.0 .*uninstall all but one of them"
    ):
        find_role("shared")


def test_distribution_twice_on_the_path_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for copy, spelling in (("old", "Twice_Kit"), ("new", "twice-kit")):
        entries = {ROLES: {"twice": "twice_echo:Echo"}}
        monkeypatch.syspath_prepend(lay_out(tmp_path / copy, spelling, entries, {"twice_echo": ECHO}))
    assert find_role("twice").__name__ == "Echo"


def test_unreadable_entry_points_do_not_affect_other_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay_out(tmp_path, "garbled-kit", {})
    (folder / "garbled_kit-1.0.dist-info" / "entry_points.txt").write_text("[troupe.roles]\nno equals sign here\n")
    monkeypatch.syspath_prepend(folder)
    assert find_role("solver") is Solver
    assert registry.unreadable() == ["garbled-kit 1.0"]
    with pytest.raises(UnknownName, match=r"The entry points of garbled-kit 1\.0 cannot be read"):
        find_role("garbled")


def test_entry_point_that_names_no_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(
        lay_out(tmp_path, "odd-kit", {ROLES: {"odd": "not a target", "bare": "agents.roles.solver"}})
    )
    with pytest.raises(BrokenPlugin, match="the entry point 'not a target' must have the form module:Class"):
        find_role("odd")
    with pytest.raises(BrokenPlugin, match="an object of type module is not a role"):
        find_role("bare")


def test_error_in_an_uninstalled_checkout_says_how_to_install() -> None:
    """Run Python without the metadata of installed distributions: modules can be imported, but none is registered."""
    root = Path(agents.__file__).parent.parent
    code = (
        "import sys, importlib.metadata as m\n"
        "import agents.registry as r\n"
        f"sys.path[:] = [{str(root)!r}]\n"
        "try: r.find_role('solver')\n"
        "except r.UnknownName as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "no role is named 'solver'; known: none" in done.stdout
    assert "Troupe is not installed: run `pip install -e .`" in done.stdout
