"""The summarizer for chat models. It condenses what other seats wrote."""

from agents.role import Message, Reply, ReplyUnusable, Role, Sampling, Task
from agents.tasks import Text, WriteTask

PROMPT = """You are the summarizer of a team. Answer the request in a few plain sentences, from what your colleagues
wrote. Leave out what does not matter, and add nothing of your own."""


class Summarizer(Role):
    """A summarizer for any chat model. It condenses what other seats wrote, in free text."""

    takes = (WriteTask,)
    sampling = Sampling(temperature=0.2, max_tokens=400)

    def messages(self, task: Task) -> list[Message]:
        assert isinstance(task, WriteTask)
        parts = [f"From {name}:\n{text}" for name, text in task.results.items()]
        return [Message("system", PROMPT), Message("user", "\n\n".join([f"Request: {task.problem}", *parts]))]

    def parse(self, text: str, task: Task) -> Reply:
        if not text.strip():
            raise ReplyUnusable("the reply is empty")
        return Text(text=text.strip())
