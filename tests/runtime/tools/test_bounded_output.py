import pytest

from runtime.tools.bounded_output import BoundedOutput, LastOutput, cut


@pytest.mark.parametrize(
    ("chunks", "notice", "text"),
    [
        ((b"ab", b"cde"), "", "abcde"),
        ((b"ab", b"cdef", b"gh"), "", "abcde\n... 3 more bytes were cut"),
        ((b"ab\n",), "ended", "ab\nended"),
        ((b"ab\n", b"cdef"), "ended", "ab\ncd\n... 2 more bytes were cut\nended"),
        ((), "ended", "ended"),
        ((b"abcd\xff",), "", "abcd�"),
        ((b"abcd\xc3",), "", "abcd�"),
        ((b"abcd\xc3", b"\xa9"), "", "abcd\n... 2 more bytes were cut"),
        ((b"ab\n\xff", b"cde"), "", "ab\n�c\n... 2 more bytes were cut"),
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


def test_text_is_cut_between_characters() -> None:
    assert cut("ééé", 6) == "ééé"
    assert cut("ééé", 5) == "éé\n... 2 more bytes were cut"
    assert cut("\ud800", 5) == "?"
