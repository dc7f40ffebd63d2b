# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error, whatever they are: a terminal, a pipe that nobody reads, a full disk, nothing."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

_STANDARD = 3
_COLOURS = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}


def prepare() -> None:
    """Open what is closed, so that no mount gets the number of a standard stream; let every name be printed."""
    for number in range(_STANDARD):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def printable(text: str) -> str:
    """Return text that is safe to print: escapes for what is not printable, and for bytes that are not UTF-8."""
    raw = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in raw)


def say(text: str) -> bool:
    """Write a result to standard output; return whether that went well. That nobody wants to read it is no failure."""
    if sys.stdout is None:
        return True
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
    except OSError as error:
        fail_to_say(error)
        return False
    return True


def fail_to_say(error: OSError) -> None:
    """Tell that standard output takes nothing."""
    _silence()
    complain(f"tuckctl: the result could not be written: {os.strerror(error.errno or 0).lower()}\n")


def complain(text: str) -> None:
    """Write to standard error, if anything can be written there."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _silence() -> None:
    """Point standard output to nowhere: what is left in its buffer would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether people read it as it is written."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def has_colour(stream: TextIO | None) -> bool:
    """Whether it takes colour, and nobody asked for none (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width(stream: TextIO | None) -> int:
    """Return how many columns fit a line."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80 if stream is not None else 80
    except (OSError, ValueError):
        return 80


class Style:
    """How a text for standard output looks: with colour, with line drawing, how long its lists may get."""

    def __init__(self) -> None:
        """Ask standard output what it is."""
        self.colour = has_colour(sys.stdout)
        self.lines = _is_unicode(sys.stdout)
        self.most = 20 if is_terminal(sys.stdout) else None

    def paint(self, text: str, colour: str) -> str:
        """Give text a colour, where there is any."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.colour and text else text

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], everything: str) -> str:
        """Lay rows out in aligned columns, without those that are empty in every row.

        `everything` is the command that shows what a list that is too long for a terminal leaves out.
        """
        left = 0
        if self.most is not None and len(rows) > self.most:
            left, rows = len(rows) - self.most, rows[: self.most]
        used = [index for index in range(len(head)) if any(row[index] for row in rows)]
        sizes = [max(len(head[index]), *(len(row[index]) for row in rows)) for index in used]

        def line(cells: Sequence[str]) -> str:
            return "  ".join(cells[index].ljust(size) for index, size in zip(used, sizes, strict=True)).rstrip()

        text = [f"  {self.paint(line(head), 'bold')}", *(f"  {line(row)}" for row in rows)]
        if left:
            text.append(f"  and {left} more: {everything}")
        return "\n".join(text) + "\n"


def _is_unicode(stream: TextIO | None) -> bool:
    return stream is not None and (stream.encoding or "").lower().replace("-", "") == "utf8"
