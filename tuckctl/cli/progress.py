# SPDX-License-Identifier: Apache-2.0
"""One line on a terminal that says how far long work is; quick work shows nothing."""

from __future__ import annotations

import sys
import time

from tuckctl import stop
from tuckctl.cli.streams import complain, is_terminal, width

_QUICK = 0.3
_EVERY = 0.1
_BYTES = ("copy", "digest")


class Line:
    """Shows progress on standard error, where that is a terminal; clears it when the work is done."""

    def __init__(self, *, quiet: bool, heed: bool) -> None:
        """Begin; `heed` lets a wish to stop end the work."""
        self._shown = 0
        self._heed = heed
        self._wanted = not quiet and is_terminal(sys.stderr)
        self._next = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell how much of what is done."""
        if self._heed:
            stop.heed()
        if not self._wanted:
            return
        now = time.monotonic()
        if not self._next:
            self._next = now + _QUICK
        elif now >= self._next:
            self._next = now + _EVERY
            self._show(_sentence(what, done, total))

    def _show(self, text: str) -> None:
        text = text[: width(sys.stderr) - 1]
        complain("\r" + text.ljust(self._shown))
        self._shown = len(text)

    def clear(self) -> None:
        """Leave an empty line to whatever is said next."""
        if self._shown:
            complain("\r" + " " * self._shown + "\r")
            self._shown = 0


def _sentence(what: str, done: int, total: int) -> str:
    share = f"{100 * done // total:3d}%" if total else ""
    if what in _BYTES:
        return f"{what} {share} of {total / (1 << 20):.0f} MiB"
    return f"{what} {done}/{total} {share}"
