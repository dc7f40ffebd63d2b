# SPDX-License-Identifier: Apache-2.0
"""A file descriptor that has one owner."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self


_STANDARD_ERROR = 2


class Fd:
    """Closes its descriptor when it is left or closed, once.

    A descriptor on a mount keeps that mount busy: an owner that forgets to close is a bug, so
    there is no closing by garbage collection.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        """Take ownership of an open descriptor."""
        self._number = number

    def fileno(self) -> int:
        """Return the number; ValueError when it is closed."""
        if self._number < 0:
            msg = "this descriptor is closed"
            raise ValueError(msg)
        return self._number

    @property
    def closed(self) -> bool:
        """Whether it was closed or released."""
        return self._number < 0

    def path(self, name: bytes = b"") -> bytes:
        """Return a path through /proc that leads to it, or to a name in it."""
        return b"/proc/self/fd/%d" % self.fileno() + (b"/" + name if name else b"")

    def turn_to(self, other: Fd) -> None:
        """Have it stand for what another one does, for everybody who shares it (dup3(2))."""
        os.dup2(other.fileno(), self.fileno(), inheritable=False)

    def release(self) -> int:
        """Give the ownership away."""
        number, self._number = self.fileno(), -1
        return number

    def close(self) -> None:
        """Close it, if it still is open.

        No error is raised: whatever close(2) returns, the kernel has let go of it, and what was written was
        synchronised before. An error in the middle of a tidying up would only end that.
        """
        if self._number >= 0:
            with contextlib.suppress(OSError):
                os.close(self.release())

    def __enter__(self) -> Self:
        """Own it for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Show the number, or that it is closed."""
        return f"Fd({self._number})" if self._number >= 0 else "Fd(closed)"


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Keep closed standard streams from becoming the tool's own files: what is printed would go into those."""
    filled = []
    try:
        while (number := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= _STANDARD_ERROR:
            filled.append(number)
        os.close(number)
        yield
    finally:
        for number in filled:
            os.close(number)


def reserve(count: int) -> None:
    """See that so many more descriptors can be had. Raises OSError (EMFILE, ENFILE)."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
