"""Compares a reply that is generated again with the part of it that was already streamed."""

from collections.abc import Sequence
from dataclasses import replace

from runtime.engines.request import Chunk
from runtime.errors import EngineError


class ReplyReplay:
    """A filter for a reply that is generated again from its beginning: it lets through only what is new.

    `tokens` and `characters` are the ids, and the length of the text, that the caller already has.
    """

    def __init__(self, engine: str, tokens: Sequence[int], characters: int) -> None:
        self._engine = engine
        self._known = tuple(tokens)
        self._known_characters = characters
        self._tokens: list[int] = []
        self._text = ""

    def new_part(self, chunk: Chunk) -> Chunk | None:
        """Return what the caller does not have of a chunk, or None if it has all of it.

        Raises EngineError if the chunk's tokens differ from those that the caller has.
        """
        start = len(self._tokens)
        if start > len(self._known):
            return chunk
        expected = self._known[start : start + len(chunk.token_ids)]
        if chunk.token_ids[: len(expected)] != expected:
            raise EngineError(
                f"engine {self._engine} died during a reply and generated different tokens after its restart; "
                "send the request again"
            )
        self._tokens += chunk.token_ids
        self._text += chunk.text
        if len(self._tokens) <= len(self._known) and chunk.finish is None:
            return None
        new_tokens = tuple(self._tokens[len(self._known) :])
        return replace(
            chunk,
            text=self._text[self._known_characters :],
            token_ids=new_tokens,
            logprobs=chunk.logprobs[len(chunk.logprobs) - len(new_tokens) :] if chunk.logprobs else (),
        )
