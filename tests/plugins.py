"""Plug-ins for tests: distributions on disk, laid out as pip does."""

from collections.abc import Mapping
from pathlib import Path


def lay_out(
    folder: Path, distribution: str, entries: Mapping[str, Mapping[str, str]], modules: Mapping[str, str] | None = None
) -> Path:
    """Write a distribution into a folder and return the folder.

    `entries` holds its entry points: targets by name, by group. `modules` holds sources by module name.
    """
    metadata = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in entries.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    for name, source in (modules or {}).items():
        (folder / f"{name}.py").write_text(source)
    return folder


ECHO = '''
from agents import Answer, AnswerTask, Message, ReplyUnusable, Role

class Echo(Role):
    """Repeats the problem."""

    takes = (AnswerTask,)

    def messages(self, task):
        return [Message("user", task.problem)]

    def parse(self, text, task):
        if not text:
            raise ReplyUnusable("nothing")
        return Answer(answer=text)
'''
"""A complete role, as a plug-in would define it."""
