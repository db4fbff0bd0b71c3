"""A reply that is generated again is streamed from where the caller left off, or refused if it differs."""

import pytest

from runtime.engines.reply_replay import ReplyReplay
from runtime.engines.request import Chunk
from runtime.errors import EngineError


def chunk(text: str, *token_ids: int, finish: str | None = None) -> Chunk:
    return Chunk(text, token_ids, time_s=0, prompt_tokens=3, finish=finish)


def replay(*chunks: Chunk) -> list[Chunk]:
    """Replay chunks to a caller that has the tokens 1, 2 and 3, of one character each."""
    known = ReplyReplay("e", [1, 2, 3], 3)
    return [new for given in chunks if (new := known.new_part(given)) is not None]


def test_chunks_that_the_caller_has_are_skipped() -> None:
    assert replay(chunk("ab", 1, 2), chunk("c", 3), chunk("d", 4), chunk("e", 5)) == [chunk("d", 4), chunk("e", 5)]


def test_a_chunk_that_the_caller_has_in_part_is_cut() -> None:
    assert replay(chunk("ab", 1, 2), chunk("cde", 3, 4, 5), chunk("f", 6)) == [chunk("de", 4, 5), chunk("f", 6)]


def test_an_end_without_new_tokens_is_streamed() -> None:
    assert replay(chunk("abc", 1, 2, 3, finish="stop")) == [chunk("", finish="stop")]


@pytest.mark.parametrize("chunks", [[chunk("x", 9)], [chunk("ab", 1, 2), chunk("xd", 9, 4)]])
def test_different_tokens_are_an_error(chunks: list[Chunk]) -> None:
    with pytest.raises(EngineError, match="engine e died during a reply and generated different tokens"):
        replay(*chunks)
