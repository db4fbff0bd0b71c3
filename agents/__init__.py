"""The roles and workflows of a team, without I/O and without engines.

The names below are what authors of roles and workflows need. `agents/README.md` is the tutorial.
"""

from agents.arithmetic.roles import ArithmeticCritic, ArithmeticPlanner, ArithmeticSolver
from agents.check_role import check_role
from agents.registry import find_role, find_task, find_workflow
from agents.role import Message, Reply, ReplyUnusable, Role, Sampling, SchemaRole, Task, TaskRefused, Value, read_json
from agents.roles.coder import Coder
from agents.roles.critic import Critic
from agents.roles.judge import Judge
from agents.roles.planner import Planner
from agents.roles.solver import Solver
from agents.roles.summarizer import Summarizer
from agents.tasks import (
    Answer,
    AnswerTask,
    Argument,
    CompareTask,
    CritiqueTask,
    DebateTask,
    JudgeTask,
    Plan,
    PlanTask,
    Ranking,
    Solution,
    SolveTask,
    Step,
    Text,
    Verdict,
    WriteTask,
)
from agents.tool import tool
from agents.workflow import Entry, Outcome, RoleCall, Unusable, Workflow
from agents.workflows.debate import Debate
from agents.workflows.deliberate import Deliberate
from agents.workflows.pipeline import Pipeline
from agents.workflows.planned import PlannedWorkflow
from agents.workflows.solo import Solo
from agents.workflows.vote import Vote

__all__ = [
    "Answer",
    "AnswerTask",
    "Argument",
    "ArithmeticCritic",
    "ArithmeticPlanner",
    "ArithmeticSolver",
    "Coder",
    "Critic",
    "CompareTask",
    "CritiqueTask",
    "Debate",
    "DebateTask",
    "Deliberate",
    "Entry",
    "Judge",
    "JudgeTask",
    "Message",
    "Outcome",
    "Pipeline",
    "Plan",
    "PlanTask",
    "PlannedWorkflow",
    "Planner",
    "Ranking",
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
    "Summarizer",
    "Task",
    "TaskRefused",
    "Text",
    "Unusable",
    "Value",
    "Verdict",
    "Vote",
    "Workflow",
    "WriteTask",
    "check_role",
    "find_role",
    "find_task",
    "find_workflow",
    "read_json",
    "tool",
]
