"""Output of a tool, kept up to a bound."""

import codecs

READ_BYTES = 1 << 16
"""The most that is read from a process at a time."""


class BoundedOutput:
    """A buffer that keeps the first `max_bytes` of an output and counts the rest.

    `total_bytes` is the size of all that was added.
    """

    def __init__(self, max_bytes: int) -> None:
        self.total_bytes = 0
        self._max_bytes = max_bytes
        self._kept = bytearray()

    def add(self, chunk: bytes) -> None:
        """Add a part of the output."""
        self.total_bytes += len(chunk)
        self._kept += chunk[: self._max_bytes - len(self._kept)]

    def text(self, notice: str = "") -> str:
        """Return the kept output as text, then a line about what was cut, if any, then the notice, if any.

        The lines come on top of `max_bytes`. The output is cut between two characters.
        """
        cut_bytes = self.total_bytes - len(self._kept)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self._kept, final=not cut_bytes)
        cut_bytes += len(decoder.getstate()[0])
        notices = [f"... {cut_bytes} more bytes were cut"] if cut_bytes else []
        notices += [notice] if notice else []
        if not notices:
            return text
        return "\n".join([text.removesuffix("\n"), *notices] if text else notices)


class LastOutput:
    """A buffer that keeps the last `max_bytes` of an output."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept = b""

    def add(self, chunk: bytes) -> None:
        """Add a part of the output."""
        self._kept = (self._kept + chunk)[-self._max_bytes :]

    def last_line(self) -> str:
        """Return the last line that is not blank, or nothing."""
        lines = self._kept.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def cut(text: str, max_bytes: int) -> str:
    """Return the first `max_bytes` of a text, in UTF-8, then a line about what was cut, if any."""
    output = BoundedOutput(max_bytes)
    output.add(text.encode(errors="replace"))
    return output.text()
