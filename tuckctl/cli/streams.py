# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error, whatever they are: a terminal, a pipe that nobody reads, a full disk, nothing."""

from __future__ import annotations

import contextlib
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_STANDARD = 3
_MOST = 20
"""How many rows of a table a terminal gets."""
_SHORTEST = 8
_MARGIN, _GAP = 2, 2
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
            # To where it is written is asked (lseek(2)): a file that cannot say may still take what is written.
            with contextlib.suppress(OSError):
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
        self.most = _MOST if is_terminal(sys.stdout) else None
        self.width = width(sys.stdout) if is_terminal(sys.stdout) else None

    def paint(self, text: str, colour: str) -> str:
        """Give text a colour, where there is any."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.colour and text else text

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        everything: str,
        colours: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Lay rows out in aligned columns, without those that are empty in every row.

        `everything` is the command that shows what a list that is too long for a terminal leaves out; where a
        terminal is too narrow, long cells are cut, or each row is a list of its own. `colours` are for whole cells.
        """
        left = 0
        if self.most is not None and len(rows) > self.most:
            left, rows = len(rows) - self.most, rows[: self.most]
        used = [index for index in range(len(head)) if any(row[index] for row in rows)]
        head, rows = [head[index] for index in used], [[row[index] for index in used] for row in rows]
        sizes = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        more = [f"  and {left} more: {everything}"] if left else []
        if self.width is not None and not _shrink(sizes, head, self.width - _MARGIN):
            return "\n".join([*self._lists(head, rows, colours), *more]) + "\n"

        def line(cells: Sequence[str]) -> str:
            padded = [self.cut(cell, size).ljust(size) for cell, size in zip(cells, sizes, strict=True)]
            words = [(cell, cell.rstrip()) for cell in (*padded[:-1], padded[-1].rstrip())]
            return "  ".join(
                self.paint(cell, colours[word]) if word in colours else cell for cell, word in words
            ).rstrip()

        titles = "  ".join(name.ljust(size) for name, size in zip(head, sizes, strict=True)).rstrip()
        title = f"  {self.paint(titles, 'bold')}"
        return "\n".join([title, *(f"  {line(row)}" for row in rows), *more]) + "\n"

    def cut(self, text: str, size: int) -> str:
        """Cut what is too long in its middle: of a path the end says most, of a name the beginning."""
        if len(text) <= size:
            return text
        kept = max(size - 1, 0)
        return text[: kept - kept // 2] + ("…" if self.lines else "~") + text[len(text) - kept // 2 :]

    def _lists(self, head: Sequence[str], rows: Sequence[Sequence[str]], colours: Mapping[str, str]) -> Iterator[str]:
        size = max(map(len, head))
        for number, row in enumerate(rows):
            if number:
                yield ""
            for name, cell in zip(head, row, strict=True):
                if cell:
                    text = self.paint(cell, colours[cell]) if cell in colours else cell
                    yield f"  {self.paint(name.ljust(size), 'bold')}  {text}"


def _shrink(sizes: list[int], head: Sequence[str], room: int) -> bool:
    """Make the widest columns narrower until they fit; say whether they do and still tell something."""
    least = [min(size, max(len(name), _SHORTEST)) for name, size in zip(head, sizes, strict=True)]
    while sum(sizes) + _GAP * (len(sizes) - 1) > room:
        widest = max(range(len(sizes)), key=lambda index: sizes[index] - least[index])
        if sizes[widest] <= least[widest]:
            return False
        sizes[widest] -= 1
    return True


def _is_unicode(stream: TextIO | None) -> bool:
    return stream is not None and (stream.encoding or "").lower().replace("-", "") == "utf8"
