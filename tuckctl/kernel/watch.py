# SPDX-License-Identifier: Apache-2.0
"""Looks at a path, one after the other without a pause, in a process that was forked for it.

The counts lie in memory that the watcher shares with the process that reads them.
"""

from __future__ import annotations

import mmap
import os
import signal
from enum import IntEnum
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel._floor import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence


class Look(IntEnum):
    """What is looked at: the floor's TUCK_WATCH_*, and what it saw as text."""

    READ = 0
    """A file's content, by open and read."""
    STAT = 1
    """A file's size."""
    READDIR = 2
    """A directory's names, sorted, with a space between them."""
    EXECVE = 3
    """A program's exit code; above 1000, the signal that ended it."""


@frozen
class Tally:
    """What a watcher saw: how often each expected text, anything else, a failure; times in microseconds.

    `sample` is the first text that was not expected, `last_errno` the last failure's.
    """

    looks: int
    seen: tuple[int, ...]
    other: int
    errors: int
    last_errno: int
    longest_absence_us: int
    sample: bytes


class Watch:
    """One watcher's counts and its orders, to be made before the watching process is forked."""

    def __init__(self) -> None:
        """Make counts of zero."""
        self._memory = mmap.mmap(-1, ffi.sizeof("struct tuck_counts"))
        self._counts = ffi.from_buffer("struct tuck_counts *", self._memory, require_writable=True)

    def look(self, how: Look, path: bytes, expected: Sequence[bytes], good: Sequence[bytes]) -> None:
        """Look until told to stop, in C throughout; what is not `good` is an absence."""
        texts = [ffi.new("char[]", text) for text in expected]
        mask = sum(1 << number for number, text in enumerate(expected) if text in good)
        value = lib.tuck_watch(how, path, ffi.new("char *[]", texts), len(texts), mask, self._counts)
        if value < 0:
            raise KernelError("watch", os.fsdecode(path), -value)

    def stop(self) -> None:
        """End the watching after the look that is under way."""
        self._counts.stop = 1

    def pause(self, microseconds: int) -> None:
        """Have the watcher rest after each look from now on; 0 is no rest."""
        self._counts.pause_us = microseconds

    @property
    def ready(self) -> bool:
        """Whether there has been a look."""
        return bool(self._counts.ready)

    def tally(self) -> Tally:
        """Return the counts as they are now."""
        counts = self._counts
        return Tally(
            counts.looks,
            tuple(counts.seen),
            counts.other,
            counts.errors,
            counts.last_errno,
            counts.longest_absence_ns // 1000,
            ffi.string(counts.sample),
        )

    def close(self) -> None:
        """Let go of the memory."""
        ffi.release(self._counts)
        self._memory.close()


def end_with_parent(parent: int) -> None:
    """Have the calling process killed when its parent ends, which may have happened already (prctl(2))."""
    value = lib.tuck_end_with_parent(signal.SIGKILL)
    if value < 0:
        raise KernelError("prctl", "PR_SET_PDEATHSIG", -value)
    if os.getppid() != parent:
        os._exit(1)
