"""The roles and workflows of a team, without I/O and without engines.

The names below are what authors of roles and workflows need. `agents/README.md` is the tutorial.
"""

from agents.arithmetic.roles import ArithmeticCritic, ArithmeticPlanner, ArithmeticSolver
from agents.check_role import check_role
from agents.critic import Critic
from agents.planner import Planner
from agents.registry import find_role, find_workflow
from agents.role import (
    Answer,
    AnswerTask,
    CritiqueTask,
    Message,
    Plan,
    PlanTask,
    Reply,
    ReplyUnusable,
    Role,
    Sampling,
    SchemaRole,
    Solution,
    SolveTask,
    Step,
    Task,
    TaskRefused,
    Value,
    Verdict,
    read_json,
)
from agents.solver import Solver
from agents.workflow import Deliberate, Entry, Outcome, PlannedWorkflow, RoleCall, Solo, Unusable, Vote, Workflow

__all__ = [
    "Answer",
    "AnswerTask",
    "ArithmeticCritic",
    "ArithmeticPlanner",
    "ArithmeticSolver",
    "Critic",
    "CritiqueTask",
    "Deliberate",
    "Entry",
    "Message",
    "Outcome",
    "Plan",
    "PlanTask",
    "PlannedWorkflow",
    "Planner",
    "Reply",
    "ReplyUnusable",
    "Role",
    "RoleCall",
    "Sampling",
    "SchemaRole",
    "Solo",
    "Solution",
    "SolveTask",
    "Solver",
    "Step",
    "Task",
    "TaskRefused",
    "Unusable",
    "Value",
    "Verdict",
    "Vote",
    "Workflow",
    "check_role",
    "find_role",
    "find_workflow",
    "read_json",
]
