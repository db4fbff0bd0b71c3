import pytest

from runtime.tools.bounded_output import BoundedOutput, LastOutput, with_notices


@pytest.mark.parametrize(
    ("chunks", "notice", "text"),
    [
        ((b"ab", b"cde"), "", "abcde"),
        ((b"ab", b"cdef", b"gh"), "", "abcde\n... 3 more bytes of output were cut"),
        ((b"ab\n",), "ended", "ab\nended"),
        ((), "ended", "ended"),
        ((b"abcd\xff",), "", "abcd�"),
    ],
)
def test_bounded_output(chunks: tuple[bytes, ...], notice: str, text: str) -> None:
    output = BoundedOutput(5)
    for chunk in chunks:
        output.add(chunk)
    assert output.text(notice) == text
    assert output.total_bytes == sum(map(len, chunks))


def test_last_output_keeps_the_end() -> None:
    output = LastOutput(8)
    for chunk in (b"first\n", b"second\n", b"last\n\n"):
        output.add(chunk)
    assert output.last_line() == "last"
    assert LastOutput(8).last_line() == ""


def test_notices_follow_the_text() -> None:
    assert with_notices("a", 0) == "a"
    assert with_notices("a\n", 2, "b") == "a\n... 2 more bytes of output were cut\nb"
